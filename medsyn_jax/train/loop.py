"""The training loop: steps, evaluations and checkpoints, resumable after every stop."""

import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import monotonic
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.log import number, say, say_cost
from medsyn_jax.core.outputs import MetricsLog
from medsyn_jax.train.checkpoint import Checkpoints
from medsyn_jax.train.state import State

SCORE = "valid/loss"  # the metric that selects the best checkpoint (lowest wins)


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of host batches whose position can be saved and restored."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict: ...
    def set_state(self, state: dict) -> None: ...
    def close(self) -> None: ...


class Preempted(SystemExit):
    """Exit after SIGTERM, with the state saved and the status that shells give."""

    def __init__(self, step: int):
        super().__init__(128 + signal.SIGTERM)
        self.step = step


@dataclass
class Plan:
    """Length and intervals of a training in steps; patience in evaluations, 0 for no limit."""

    steps: int
    eval_every: int
    checkpoint_every: int
    log_every: int
    patience: int


@dataclass
class Progress:
    """State of early stopping, saved in the checkpoints.

    stale: evaluations since the best score. first, last: scores for `summary`.
    """

    best: float = math.inf
    stale: int = 0
    done: bool = False
    first: float | None = field(default=None, compare=False)
    last: float | None = field(default=None, compare=False)

    def summary(self, kept: int, steps: int) -> str:
        """One line: the step that is kept, its score, and whether the training stopped early."""
        best, first, last = map(number, (self.best, self.first, self.last))
        scores = f"{SCORE} {best}; {first} at the first evaluation, {last} at the last"
        early = f"; stopped early, {self.stale} evaluations without a lower one"
        return f"kept step {kept} of {steps}: {scores}{early if self.done else ''}"

    def update(self, score: float, patience: int) -> None:
        """Take the score of an evaluation into account."""
        self.first, self.last = score if self.first is None else self.first, score
        better = score < self.best
        self.best = min(self.best, score)
        self.stale = 0 if better else self.stale + 1
        self.done = bool(patience) and self.stale >= patience


@dataclass
class Pending:
    """Metrics of a step, perhaps still being computed, and the indices of its records."""

    step: int
    metrics: Mapping[str, Any]  # scalars
    records: np.ndarray


@dataclass
class Trainer:
    """The arguments of `fit` beside the state; every step folds its number into `key`."""

    step: Callable[[State, dict, jax.Array], tuple[State, dict]]
    batches: Batches
    evaluate: Callable[[State], Mapping[str, float]]  # metrics with SCORE
    checkpoints: Checkpoints
    log: MetricsLog
    mesh: Mesh
    key: jax.Array
    plan: Plan
    record_keys: Callable[[np.ndarray], list[str]]  # by the `index` of batches, for messages
    progress: Progress = field(default_factory=Progress)


def resume(trainer: Trainer, state: State) -> State:
    """Restore state, iterator and early stopping from the latest checkpoint, if there is one."""
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
    """Train to the end of the plan or to early stopping.

    Raises Preempted on SIGTERM, and UserError for a loss or gradient that is not finite.
    """
    plan, step = trainer.plan, int(state["step"])
    key = meshes.replicate_key(trainer.mesh, trainer.key)
    first, stop, loading = step + 1, False, _Loading()
    pending: Pending | None = None
    with _Sigterm() as sigterm:
        while step < plan.steps and not trainer.progress.done and not stop:
            batch = loading.next(trainer.batches, pending)
            arrays = meshes.to_devices(trainer.mesh, batch)
            with jax.transfer_guard("disallow"):
                state, metrics = trainer.step(state, arrays, key)
            step += 1
            if pending:
                _read(trainer, pending)
                if pending.step == first:
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
        # SIGTERM may come during the last evaluation or save; the caller's next work takes long.
        if stop or sigterm.reached(step + 1):
            say(f"SIGTERM: saved at step {step}; the same command resumes")
            raise Preempted(step)
    return state


class _Loading:
    """Warns once if the device waits for batches for 30 % of the time, after the first 20 steps."""

    def __init__(self) -> None:
        self._steps, self._waited, self._since, self._said = 0, 0.0, monotonic(), False

    def next(self, batches: Batches | Iterator, pending: Pending | None) -> dict[str, np.ndarray]:
        """The next batch, loaded while the device computes the pending step."""
        before, batch, now = monotonic(), next(batches), monotonic()
        loss: Any = pending and pending.metrics["loss"]
        idle = loss is None or loss.is_ready()
        self._waited, self._steps = self._waited + idle * (now - before), self._steps + 1
        if self._steps % 20 == 0:
            share = self._waited / max(now - self._since, 1e-9)
            if share > 0.3 and self._steps > 20 and not self._said:
                say(f"waiting for batches {share:.0%} of the time: raise --config.data.threads")
                self._said = True
            self._waited, self._since = 0.0, now
        return batch


def _read(trainer: Trainer, pending: Pending) -> None:
    """Log a step's metrics; one step late, so that the device does not wait for the host."""
    metrics = {k: float(v) for k, v in jax.device_get(pending.metrics).items()}
    # An infinite gradient has spoiled the parameters already; the loss shows it a step later.
    for key, noun in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if not math.isfinite(metrics.get(key, 0.0)):
            keys = trainer.record_keys(pending.records)
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            raise UserError(
                f"the {noun} is {metrics[key]} at step {pending.step}, trained on {shown}: "
                "look at these records, or lower config.optim.lr in another --workdir; the last "
                "checkpoint is from before this step"
            )
    plan = trainer.plan
    rate = trainer.log.progress(pending.step, metrics["loss"])
    # By steps, not by the clock: a resumed run writes the same lines as an unbroken one.
    if pending.step % plan.log_every == 0 or pending.step == plan.steps:
        extra = {} if rate is None else {"images_per_second": rate}
        trainer.log.write(pending.step, {f"train/{k}": v for k, v in metrics.items()} | extra)


def _evaluate(trainer: Trainer, state: State, step: int) -> float | None:
    """The score of a state, None if it is not finite."""
    metrics = trainer.evaluate(state)
    trainer.log.write(step, metrics)
    score = float(metrics[SCORE])
    trainer.progress.update(score, trainer.plan.patience)
    say(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    return score if math.isfinite(score) else None  # NaN must not become the best


def _save(trainer: Trainer, state: State, score: float | None) -> None:
    """Save state and iterator together, before the next batch is drawn."""
    meta = {"batches": trainer.batches.get_state(), "progress": vars(trainer.progress)}
    trainer.checkpoints.save(state, meta, score)


class _Sigterm:
    """Notes SIGTERM; `reached` is true from the next step on, the same step on every process."""

    def __enter__(self) -> "_Sigterm":
        self._arrived, self._several = False, jax.process_count() > 1
        if not self._several:
            self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived = True

    def reached(self, step: int) -> bool:
        if self._several:  # jax.distributed has its own handler, and agrees on a step
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._arrived

    def __exit__(self, *_: Any) -> None:
        if not self._several:
            signal.signal(signal.SIGTERM, self._old)
