"""From the `optim` and `train` sections of a config to a run that ends at its best checkpoint."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import optim
from medsyn_jax.core.errors import UserError
from medsyn_jax.data import loader
from medsyn_jax.train import loop
from medsyn_jax.train.state import State


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
    return loop.Plan(
        steps=max(1, round(train.epochs * per_epoch)),
        eval_every=max(1, round(per_epoch / train.evals_per_epoch)),
        checkpoint_every=max(1, round(per_epoch / train.checkpoints_per_epoch)),
        log_every=train.log_every,
        patience=train.patience,
        score=score,
    )


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
        held_steps=round(c.held_epochs * per_epoch),
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
    state = checkpoints.restore(checkpoints.best() or trainer.plan.steps, state)
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
