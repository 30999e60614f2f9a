"""The training loop: batches in, steps out, and at every stop a state that can go on."""

import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.log import number, say, say_cost
from medsyn_jax.core.outputs import MetricsLog
from medsyn_jax.train.checkpoint import Checkpoints
from medsyn_jax.train.state import State


class Batches(Protocol):
    """An endless iterator of host batches that can say where it is and go there."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict: ...
    def set_state(self, state: dict) -> None: ...
    def close(self) -> None: ...


class Preempted(SystemExit):
    """SIGTERM arrived and everything is saved; leaves with the status shells give to it."""

    def __init__(self, step: int):
        super().__init__(128 + signal.SIGTERM)
        self.step = step


@dataclass
class Plan:
    """When things happen, in steps. patience: evaluations without a better score, 0 for no limit.

    score: the metric of `evaluate` that selects the best checkpoint (lowest wins).
    """

    steps: int
    eval_every: int
    checkpoint_every: int
    log_every: int
    patience: int
    score: str


@dataclass
class Progress:
    """What early stopping knows; travels in the checkpoint."""

    best: float = math.inf
    stale: int = 0
    done: bool = False
    first: float | None = field(default=None, compare=False)  # of the scores, to be told
    last: float | None = field(default=None, compare=False)

    def summary(self, kept: int, plan: Plan) -> str:
        """Which step is kept, and why, in one line."""
        scores = [number(x) for x in (self.best, self.first, self.last)]
        values = "{} {}; {} at the first evaluation, {} at the last".format(plan.score, *scores)
        early = f"; stopped early, {self.stale} evaluations without a lower one"
        return f"kept step {kept} of {plan.steps}: {values}{early if self.done else ''}"

    def update(self, score: float, patience: int) -> None:
        self.first, self.last = score if self.first is None else self.first, score
        better = score < self.best
        self.best = min(self.best, score)
        self.stale = 0 if better else self.stale + 1
        self.done = bool(patience) and self.stale >= patience


@dataclass
class Pending:
    """Metrics of a step that the device may still be computing, and the records it trained on."""

    step: int
    metrics: Mapping[str, jax.Array]
    records: np.ndarray


@dataclass
class Trainer:
    """All that `fit` needs beside the state. Not a class to inherit from: a bundle of arguments."""

    step: Callable[[State, dict, jax.Array], tuple[State, dict]]
    batches: Batches
    evaluate: Callable[[State], Mapping[str, float]]
    checkpoints: Checkpoints
    log: MetricsLog
    mesh: Mesh
    key: jax.Array
    plan: Plan
    record_keys: Callable[[np.ndarray], list[str]]
    progress: Progress = field(default_factory=Progress)


def resume(trainer: Trainer, state: State) -> State:
    """Go to the latest checkpoint, if there is one: state, iterator and early stopping."""
    step = trainer.checkpoints.latest()
    if step is None:
        return state
    meta = trainer.checkpoints.meta(step)
    trainer.batches.set_state(meta["batches"])
    trainer.progress = Progress(**meta["progress"])
    state = trainer.checkpoints.restore(step, state)
    say(f"resumed at step {step}")
    return state


def fit(trainer: Trainer, state: State) -> State:
    """Train to the end of the plan, or until early stopping, or SIGTERM (raises Preempted)."""
    plan, step = trainer.plan, int(state["step"])
    key = meshes.replicate_key(trainer.mesh, trainer.key)
    start = step
    stop, waiting = False, _Waiting()
    pending: Pending | None = None
    with _Sigterm() as sigterm:
        while step < plan.steps and not trainer.progress.done and not stop:
            batch = waiting.next(trainer.batches, pending)
            arrays = meshes.to_devices(trainer.mesh, batch)
            with jax.transfer_guard("disallow"):
                state, metrics = trainer.step(state, arrays, key)
            step += 1
            if pending:
                _read(trainer, pending)
                if pending.step == start + 1:
                    say_cost("first step done")
            pending = Pending(step, metrics, batch["index"])
            stop = sigterm.reached(step)
            evaluate = step % plan.eval_every == 0 or step == plan.steps
            if evaluate or stop or step % plan.checkpoint_every == 0:
                _read(trainer, pending)
                pending = None
                with trainer.log.paused():
                    score = _evaluate(trainer, state, step) if evaluate else None
                    _save(trainer, state, score)
        trainer.checkpoints.wait()
        # It may have come during the last evaluation or save, and what the caller does takes long.
        if stop or sigterm.reached(step + 1):
            say(f"SIGTERM: saved at step {step}; the same command resumes")
            raise Preempted(step)
    return state


class _Waiting:
    """Says once if, after the first 20 steps, the device waits for batches for 30 % of the time."""

    def __init__(self) -> None:
        self._steps, self._waited, self._since, self._said = 0, 0.0, monotonic(), False

    def next(self, batches: Batches, running: Pending | None) -> dict[str, np.ndarray]:
        before, batch, now = monotonic(), next(batches), monotonic()
        loss: Any = running and running.metrics["loss"]
        idle = loss is None or loss.is_ready()  # else the device computed meanwhile
        self._waited, self._steps = self._waited + idle * (now - before), self._steps + 1
        if self._steps % 20 == 0:
            share = self._waited / max(now - self._since, 1e-9)
            if share > 0.3 and self._steps > 20 and not self._said:
                say(f"waiting for batches {share:.0%} of the time: raise --config.data.threads")
                self._said = True
            self._waited, self._since = 0.0, now
        return batch


def _read(trainer: Trainer, pending: Pending) -> None:
    """Bring a step's metrics to the host; one step late, so that the device never waits for it."""
    metrics = {k: float(v) for k, v in jax.device_get(pending.metrics).items()}
    # A gradient that is not finite has spoiled the parameters, though the loss tells a step later.
    names_of = {"loss": "loss", "grad_norm": "gradient norm"}
    wrong = [k for k in names_of if not math.isfinite(metrics.get(k, 0.0))]
    if wrong:
        names = trainer.record_keys(pending.records)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UserError(
            f"the {names_of[wrong[0]]} is {metrics[wrong[0]]} at step {pending.step}, trained on "
            f"{shown}: look at these, "
            "or lower config.optim.lr in another --workdir; the last checkpoint is from before it"
        )
    plan = trainer.plan
    rate = trainer.log.progress(pending.step, metrics["loss"])
    # Never by the clock: a run that was resumed writes the lines of the unbroken one.
    if pending.step % plan.log_every == 0 or pending.step == plan.steps:
        extra = {} if rate is None else {"images_per_second": rate}
        trainer.log.write(pending.step, {f"train/{k}": v for k, v in metrics.items()} | extra)


def _evaluate(trainer: Trainer, state: State, step: int) -> float | None:
    metrics = trainer.evaluate(state)
    trainer.log.write(step, metrics)
    score = float(metrics[trainer.plan.score])
    trainer.progress.update(score, trainer.plan.patience)
    say(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    return score if math.isfinite(score) else None  # NaN is lower than nothing


def _save(trainer: Trainer, state: State, score: float | None) -> None:
    """State and iterator together, before the next batch is drawn."""
    meta: dict[str, Any] = {
        "batches": trainer.batches.get_state(),
        "progress": vars(trainer.progress),
    }
    trainer.checkpoints.save(state, meta, score)


class _Sigterm:
    """Notes SIGTERM; `reached` says so at the next step, on every process at the same one."""

    def __enter__(self) -> "_Sigterm":
        self._seen = False
        if jax.process_count() == 1:
            self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True

    def reached(self, step: int) -> bool:
        if (
            jax.process_count() > 1
        ):  # jax.distributed has a handler of its own, and agrees on a step
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._seen

    def __exit__(self, *_: Any) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._old)
