"""A training run: from the `optim` and `train` sections of a config to the best state.

Every training task assembles its run here: `Training.fit` from a placed state, `fit_averaged` from
parameters, with an exponential moving average of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from medsyn_jax.core import checks, log, optim, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading import loader
from medsyn_jax.train import ema, frozen, loop
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.checkpoint import Checkpoints
from medsyn_jax.train.state import State

# Fields that may differ between two starts of one run: where it computes, not what.
FREE = ("mesh.", "data.threads", "ingest.workers", "train.log_every")
_MOST_STEPS = 2**31 - 1  # devices count them in int32
_FEW_STEPS = 200  # with fewer, networks stay nearly as they start


def rules(prefix: str = "") -> tuple[checks.Rule, ...]:
    """Checks of the `optim` and `train` sections below a prefix, such as "autoencoder."."""
    train, update = f"{prefix}train", f"{prefix}optim"
    return (
        checks.numbers("above 0", train, "epochs evals_per_epoch checkpoints_per_epoch log_every"),
        checks.numbers("above 0", update, "lr accumulate"),
        checks.numbers("from 0", update, "end_lr weight_decay clip held_epochs"),
        checks.numbers("from 0", train, "patience"),
        checks.numbers("below 1", update, "b1 b2"),
        checks.numbers("share", update, "warmup"),
        checks.texts(update, "frozen held unit_rows"),
    )


@dataclass(frozen=True)
class Training:
    """What one training reads, by which settings, and where it computes and writes.

    Attributes:
        section: of the config, with `optim` and `train` (and `ema`).
        batch_size: records a step over all devices.
        seed: of the order of records and of the steps' keys.
        threads: that read records.
        sources: training sources, and
        weights: how often a record comes from each.
        workdir: for checkpoints and metrics.
        mesh: the devices.
    """

    section: Any
    batch_size: int
    seed: int
    threads: int
    sources: Sequence[loader.Source]
    weights: Sequence[float]
    workdir: Path
    mesh: Mesh

    @property
    def records(self) -> int:
        """Training records of all sources."""
        return sum(len(source) for source in self.sources)

    @cached_property
    def plan(self) -> loop.Plan:
        """When things happen. Raises UserError if a batch is more than all records."""
        return make_plan(self.section.train, self.records, self.batch_size)

    def optimizer(self, params: Any) -> optax.GradientTransformation:
        """AdamW as the `optim` section says, for `params` (arrays or shapes)."""
        c, steps = self.section.optim, self.plan.steps
        held = c.held_epochs * (self.records // self.batch_size)
        return optim.adamw(
            params,
            optim.warmup_cosine(c.lr, steps, round(c.warmup * steps), c.end_lr),
            b1=c.b1,
            b2=c.b2,
            weight_decay=c.weight_decay,
            clip=c.clip,
            frozen=tuple(c.frozen),
            held=tuple(c.held),
            held_steps=round(min(held, _MOST_STEPS)),
            unit_rows=tuple(c.unit_rows),
        )

    def fit(
        self,
        state: State,
        tx: optax.GradientTransformation,
        loss_fn: steps.LossFn,
        evaluate: Callable[[State], Mapping[str, float]],
    ) -> State:
        """Train from the latest checkpoint, or from `state`, and return the best state.

        evaluate: metrics of a state; the state with the lowest "valid/loss" is the best.
        """
        optim = self.section.optim
        local = meshes.per_process(self.batch_size, self.mesh, optim.accumulate)
        this, count = jax.process_index(), jax.process_count()
        checkpoints = Checkpoints(self.workdir / "checkpoints")
        start = checkpoints.latest() or 0
        step = steps.make_step(loss_fn, tx, optim.accumulate, tuple(optim.frozen))
        trainer = loop.Trainer(
            step=steps.compile_step(step, state, self.mesh),
            batches=loader.train_loader(
                self.sources, self.weights, local, self.seed, this, count, self.threads
            ),
            evaluate=evaluate,
            checkpoints=checkpoints,
            log=outputs.MetricsLog(self.workdir, start, self.plan.steps, self.batch_size),
            mesh=self.mesh,
            key=jax.random.key(self.seed),
            plan=self.plan,
            record_keys=lambda index: loader.record_keys(self.sources, index),
        )
        try:
            state = loop.fit(trainer, loop.resume(trainer, state))
        finally:
            trainer.log.close()
            trainer.batches.close()
            checkpoints.wait()  # a save that has begun ends, whatever ended the loop
        best = checkpoints.best() or self.plan.steps
        log.say(trainer.progress.summary(best, self.plan))
        state = checkpoints.restore(best, state)
        checkpoints.close()
        return state

    def say_size(self, state: State) -> None:
        """Print the numbers of records, steps and parameters."""
        size = states.summary(state)
        log.say(f"{self.records} training records, {self.plan.steps} steps; {size}")


def fit_averaged(
    training: Training,
    params: Any,
    still: Any,
    loss_fn: steps.LossFn,
    error_fn: Callable,
    valid: loader.Source,
) -> tuple[Any, np.ndarray]:
    """(averaged parameters on the host, validation error of each record) of the best state.

    params, still: trained parameters, and what else the networks have (NumPy). error_fn: (params,
    still, batch) -> errors [b], whose mean over `valid` chooses the best state.
    """
    tx = ema.keep_average(training.optimizer(params), training.section.ema)
    state = states.place(params, still, tx, training.mesh, meshes.FSDP_RULES)
    training.say_size(state)
    error = steps.compile_eval(error_fn, state, training.mesh)

    def errors(state: State) -> np.ndarray:
        averaged = ema.averaged(state["opt"])
        return frozen.over(
            lambda batch: error(averaged, state["stats"], batch),
            valid,
            training.mesh,
            training.batch_size,
            training.threads,
        )

    state = training.fit(
        state, tx, loss_fn, lambda state: {"valid/loss": float(errors(state).mean())}
    )
    return meshes.to_host(ema.averaged(state["opt"])), errors(state)


def make_plan(train: Any, records: int, batch_size: int) -> loop.Plan:
    """When things happen, in steps, of a `train` section that counts in epochs of `records`.

    Raises UserError if a batch is more than all records.
    """
    per_epoch = records // batch_size
    if not per_epoch:
        raise UserError(
            f"config.data.batch_size: {batch_size} is more than the {records} training records: "
            "use a smaller one"
        )
    if train.epochs * per_epoch > _MOST_STEPS:
        raise UserError(f"config.train.epochs: {train.epochs}: is more than {_MOST_STEPS} steps")
    steps = _steps(train.epochs * per_epoch)
    if steps < _FEW_STEPS:
        log.say(
            f"only {steps} training steps ({train.epochs:g} epochs of {records} records by "
            f"{batch_size}): networks stay nearly as they start: raise --config.train.epochs or "
            f"use smaller batches, for {_FEW_STEPS} steps or more"
        )
    return loop.Plan(
        steps=steps,
        eval_every=_steps(per_epoch / train.evals_per_epoch),
        checkpoint_every=_steps(per_epoch / train.checkpoints_per_epoch),
        log_every=train.log_every,
        patience=train.patience,
        score="valid/loss",
    )


def _steps(number: float) -> int:
    return max(1, round(min(number, _MOST_STEPS)))
