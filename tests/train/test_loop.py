import gc
import json
import math
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.outputs import MetricsLog
from medsyn_jax.train import loop
from medsyn_jax.train.checkpoint import Checkpoints
from tests.train import toy

STEPS = 7


class Stop(Exception):
    """Stands for whatever ends a process without warning."""


class Batches(toy.Batches):
    """The toy's, with something that happens when the batch of step `at` is drawn."""

    def __init__(self, at=None, happens=lambda batch: batch):
        super().__init__()
        self.at, self.happens = at, happens

    def __next__(self):
        batch = super().__next__()
        return self.happens(batch) if self.position == self.at else batch


def stop(batch):
    raise Stop


@pytest.fixture(scope="module")
def compiled():
    return toy.setup(toy.one_device_mesh())[1]


@pytest.fixture(scope="module")
def make(compiled, tmp_path_factory):
    """make(folder, ...) -> a trainer as a new process would build it."""
    root = tmp_path_factory.mktemp("runs")
    trainers = []

    def build(folder, batches=None, scores=lambda step: 1 / step, step=compiled, **plan):
        usual = {"steps": STEPS, "eval_every": 3, "checkpoint_every": 2, "log_every": 1}
        workdir = root / folder
        workdir.mkdir(exist_ok=True)
        checkpoints = Checkpoints(workdir / "checkpoints")
        trainer = loop.Trainer(
            step=step,
            batches=batches or Batches(),
            evaluate=lambda state: {"valid/loss": scores(int(state["step"]))},
            checkpoints=checkpoints,
            log=MetricsLog(workdir, checkpoints.latest() or 0, STEPS, 16),
            mesh=toy.one_device_mesh(),
            key=jax.random.key(1),
            plan=loop.Plan(**usual | {"patience": 0} | plan),
            record_keys=lambda index: [f"record{i}" for i in index],
        )
        trainers.append(trainer)
        return trainer

    yield build
    for trainer in trainers:
        trainer.log.close()
        trainer.checkpoints.close()


def train(trainer):
    state = jax.device_put(toy.initial(), jax.sharding.NamedSharding(trainer.mesh, loop.meshes.P()))
    return toy.on_host(loop.fit(trainer, loop.resume(trainer, state)))


def lines(trainer):
    text = trainer.log._path.read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in found]


def assert_same(a, b):
    a, b = tree.named(a), tree.named(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def unbroken(make):
    trainer = make("unbroken")
    return train(trainer), trainer


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(make, unbroken, at):
    whole, one = unbroken
    folder = f"broken at {at}"
    first = make(folder, Batches(at, stop))
    with pytest.raises(Stop):
        train(first)
    first.checkpoints.wait()
    trainer = make(folder)
    assert_same(train(trainer), whole)
    assert lines(trainer) == lines(one)
    steps = trainer.checkpoints.latest(), trainer.checkpoints.best()
    assert steps == (one.checkpoints.latest(), one.checkpoints.best()) == (STEPS, STEPS)
    assert trainer.checkpoints.meta(STEPS) == one.checkpoints.meta(STEPS)


# Orbax leaves calls to its own closed event loop behind when a read fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_latest_checkpoint_is_moved_away_and_the_one_before_goes_on(make, unbroken):
    whole, one = unbroken
    first = make("damaged", Batches(5, stop))
    with pytest.raises(Stop):
        train(first)
    first.checkpoints.wait()
    latest = first.checkpoints.directory / "4"
    for path in (latest / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoints/4 is incomplete .*: move this folder away"):
        train(make("damaged"))
    gc.collect()
    latest.rename(first.checkpoints.directory.parent / "4-damaged")
    trainer = make("damaged")
    assert trainer.checkpoints.latest() == 3
    assert_same(train(trainer), whole)
    assert lines(trainer) == lines(one)


def test_metrics_are_read_a_step_late_and_none_is_lost(make, compiled):
    happened = []

    def step(*arguments):
        happened.append("step")
        return compiled(*arguments)

    trainer = make("late", step=step, eval_every=100, checkpoint_every=100)
    write = trainer.log.write
    trainer.log.write = lambda at, metrics: (happened.append(at), write(at, metrics))
    train(trainer)
    # Step 2 is on its way before the metrics of step 1 are read, and so on; the last step ends with
    # the metrics of both, and those of the evaluation.
    expected = ["step", *(x for i in range(1, STEPS) for x in ("step", i)), STEPS, STEPS]
    assert happened == expected
    losses = {line["step"]: line["train/loss"] for line in lines(trainer) if "train/loss" in line}
    state = jax.device_put(toy.initial(), jax.devices()[0])
    for at in range(1, STEPS + 1):
        state, metrics = compiled(state, toy.batch_of(at - 1), jax.random.key(1))
        assert losses.pop(at) == float(metrics["loss"])
    assert not losses


def test_lines_come_at_fixed_steps_whatever_the_clock_says(make):
    slow, fast = (make(name, log_every=3) for name in ("slow", "fast"))
    slow.log.every_s, fast.log.every_s = 0.0, 1e9  # a reading of the rate at each step, or none
    train(slow)
    train(fast)
    assert lines(slow) == lines(fast)
    assert [x["step"] for x in lines(slow) if "train/loss" in x] == [3, 6, STEPS]
    assert '"images_per_second"' in slow.log._path.read_text()


def test_early_stopping_keeps_the_best_and_stays_stopped(make, compiled):
    scores = [3.0, 2.0, 2.5, 2.1, 1.0].__getitem__
    calls = []

    def step(*arguments):
        calls.append(1)
        return compiled(*arguments)

    def build():
        return make(
            "stopped", scores=lambda at: scores(at - 1), step=step, eval_every=1, patience=2
        )

    trainer = build()
    train(trainer)
    assert len(calls) == 4
    assert (trainer.checkpoints.best(), trainer.checkpoints.latest()) == (2, 4)
    assert trainer.progress == loop.Progress(best=2.0, stale=2, done=True)
    again = build()
    assert int(train(again)["step"]) == len(calls) == 4
    assert again.checkpoints.best() == 2
    assert again.progress.summary(2, STEPS) == (
        "kept step 2 of 7: valid/loss 2; 3 at the first evaluation, 2.1 at the last; "
        "stopped early, 2 evaluations without a lower one"
    )


def test_a_score_that_is_no_number_is_never_the_best(make):
    scores = [math.nan, 2.0, math.nan, 3.0, math.inf, math.nan, math.nan]
    trainer = make("no number", scores=lambda step: scores[step - 1], eval_every=1)
    train(trainer)
    assert (trainer.checkpoints.best(), trainer.checkpoints.latest()) == (2, STEPS)
    assert trainer.progress.best == 2.0


def test_sigterm_saves_and_the_same_command_goes_on(make, unbroken):
    before = signal.getsignal(signal.SIGTERM)

    def terminate(batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch

    trainer = make("terminated", Batches(5, terminate))
    with pytest.raises(SystemExit) as caught:
        train(trainer)
    assert (caught.value.code, caught.value.step) == (143, 5)
    assert signal.getsignal(signal.SIGTERM) == before
    trainer = make("terminated")
    assert trainer.checkpoints.latest() == 5  # between two checkpoints of the plan
    whole, one = unbroken
    assert_same(train(trainer), whole)
    assert lines(trainer) == lines(one)


def test_sigterm_during_the_last_evaluation_is_not_lost(make, unbroken):
    def terminate(step):
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1 / step

    with pytest.raises(loop.Preempted) as caught:
        train(make("late term", scores=terminate))
    assert (caught.value.code, caught.value.step) == (143, STEPS)
    trainer = make("late term")
    assert trainer.checkpoints.latest() == STEPS
    whole, one = unbroken
    assert_same(train(trainer), whole)
    assert lines(trainer) == lines(one)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(make, unbroken):
    def spoil(batch):
        batch["image"][3] = np.nan
        return batch

    trainer = make("loss", Batches(6, spoil))  # 6 would be saved and evaluated
    names = "record500, record501, .* and 8 more"
    with pytest.raises(UserError, match=rf"the loss is nan at step 6, trained on {names}: .*lr"):
        train(trainer)
    trainer.checkpoints.wait()
    again = make("loss")
    assert again.checkpoints.latest() == 4
    assert_same(train(again), unbroken[0])


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(make, compiled):
    def step(state, arrays, key):
        at = int(jax.device_get(state["step"])) + 1
        state, metrics = compiled(state, arrays, key)
        return state, metrics | ({"grad_norm": math.inf} if at == 4 else {})

    trainer = make("gradient", step=step)
    with pytest.raises(UserError, match="the gradient norm is inf at step 4, trained on record300"):
        train(trainer)
    assert trainer.checkpoints.latest() == 3


def test_the_loop_moves_nothing_between_host_and_device_unasked(make, compiled):
    def step(state, arrays, key):
        return compiled(state, {**arrays, "image": np.zeros((16, 16, 16, 1), np.float32)}, key)

    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(make("guard", step=step))


@pytest.mark.parametrize(("seconds", "done", "told"), [(4, True, 1), (2, True, 0), (4, False, 0)])
def test_a_loader_that_starves_the_device_is_told_once(monkeypatch, capsys, seconds, done, told):
    """A step takes 5 s on this clock; what the device waits for only counts once it is done."""
    clock = [0.0]
    metrics = {"loss": SimpleNamespace(is_ready=lambda: done)}
    monkeypatch.setattr(loop, "monotonic", lambda: clock[0])

    def batches():
        while True:
            # The first 20 steps may wait for a loader that is only starting.
            clock[0] += seconds if len(drawn) >= 20 else 100
            yield {}

    drawn, source, loading = [], batches(), loop._Loading()
    for step in range(80):
        drawn.append(loading.next(source, loop.Pending(step, metrics, np.arange(1))))
        clock[0] += 5.0
    assert len(drawn) == 80
    assert capsys.readouterr().err.count("waiting for batches 44% of the time: raise") == told
