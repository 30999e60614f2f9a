"""From the `optim` and `train` sections of a config to a run that ends at its best checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from medsyn_jax.core import log, optim
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.config import check_numbers, check_texts
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading import loader
from medsyn_jax.train import loop
from medsyn_jax.train.state import State

_MOST_STEPS = 2**31 - 1  # devices count them in int32
_FEW_STEPS = 200  # with fewer an encoder is in effect untrained


def check(config: Any, stage: str = "") -> None:
    """UserError for an `optim` or `train` section, below the prefix `stage`, that cannot be run."""

    def named(section: str, fields: str) -> list[str]:
        return [f"{stage}{section}.{field}" for field in fields.split()]

    above_0 = named("train", "epochs evals_per_epoch checkpoints_per_epoch log_every")
    from_0 = named("optim", "end_lr weight_decay clip held_epochs")
    check_numbers(
        config,
        above_0=above_0 + named("optim", "lr accumulate"),
        from_0=from_0 + named("train", "patience"),
        below_1=named("optim", "b1 b2"),
        shares=named("optim", "warmup"),
    )
    check_texts(config, named("optim", "frozen held unit_rows"))


def plan(train: Any, records: int, batch_size: int, score: str = "valid/loss") -> loop.Plan:
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
        score=score,
    )


def _steps(number: float) -> int:
    return max(1, round(min(number, _MOST_STEPS)))


def optimizer(c: Any, params: Any, steps: int, per_epoch: int = 0) -> optax.GradientTransformation:
    """AdamW as an `optim` section says, for `params` (arrays or shapes) over `steps`.

    per_epoch: steps, for parameters that are held for `held_epochs`.
    """
    schedule = optim.warmup_cosine(c.lr, steps, round(c.warmup * steps), c.end_lr)
    return optim.adamw(
        params,
        schedule,
        b1=c.b1,
        b2=c.b2,
        weight_decay=c.weight_decay,
        clip=c.clip,
        frozen=tuple(c.frozen),
        held=tuple(c.held),
        held_steps=round(min(c.held_epochs * per_epoch, _MOST_STEPS)),
        unit_rows=tuple(c.unit_rows),
    )


def run(trainer: loop.Trainer, state: State) -> State:
    """Train from the latest checkpoint, if any, to the end; returns the state of the best one."""
    checkpoints = trainer.checkpoints
    try:
        state = loop.fit(trainer, loop.resume(trainer, state))
    finally:
        trainer.log.close()
        trainer.batches.close()
        checkpoints.wait()  # whatever ended the loop, what is being saved gets finished
    best = checkpoints.best() or trainer.plan.steps
    log.say(trainer.progress.summary(best, trainer.plan))
    state = checkpoints.restore(best, state)
    checkpoints.close()
    return state


def over(
    fn: Callable[[dict[str, jax.Array]], Any],
    source: loader.Readable,
    batch_size: int,
    threads: int,
    mesh: Mesh,
) -> Any:
    """The outputs of `fn`, a tree of arrays [b, ...] that are whole on every device, for every
    record of a source in its order: NumPy, axis 0 of its length. batch_size: on this process."""
    rows = []
    everywhere = meshes.replicated(mesh)
    this, count = jax.process_index(), jax.process_count()
    for batch in loader.eval_loader(source, batch_size, this, count, threads):
        arrays = meshes.to_devices(mesh, batch)
        weight = jax.device_put(arrays["weight"], everywhere)
        found, weight = jax.device_get((fn(arrays), weight))
        rows.append(jax.tree.map(lambda x, real=weight > 0: x[real], found))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
