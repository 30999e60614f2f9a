"""One of the trainings that a run consists of, from parameters to the averaged best ones."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core import log
from medsyn_jax.core import mesh as meshes
from medsyn_jax.data.loading import loader
from medsyn_jax.train import ema, loop, recipe
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.checkpoint import Checkpoints


@dataclass
class Stage:
    """One training of a run on some sources, of averaged weights.

    config: with data.threads and seed. section: with optim, train and ema. workdir: of the stage.
    valid: what the best state is chosen by, never trained on.
    """

    config: Any
    section: Any
    batch_size: int
    workdir: Path
    train: list[loader.Source]
    valid: loader.Source
    mesh: Mesh

    def fit(
        self, params: Any, still: Any, loss_fn: steps.LossFn, error_fn: Callable
    ) -> tuple[Any, np.ndarray]:
        """(averaged parameters on the host, validation error of each record) of the best state.

        still: what the networks have besides and is not trained. error_fn: (params, still, batch)
        -> errors [b], of which the mean is to become low.
        """
        section, mesh, sources = self.section, self.mesh, self.train
        settings, seed = self.config.data, self.config.seed
        local = meshes.per_process(self.batch_size, mesh, section.optim.accumulate)
        records = sum(len(source) for source in sources)
        plan = recipe.plan(section.train, records, self.batch_size)
        tx = recipe.optimizer(section.optim, params, plan.steps)
        tx = ema.keep_average(tx, section.ema)
        state = states.place(params, still, tx, mesh, meshes.FSDP_RULES)
        log.say(f"{records} training records, {plan.steps} steps; {states.summary(state)}")
        frozen = tuple(section.optim.frozen)
        step = steps.make_step(loss_fn, tx, section.optim.accumulate, frozen)
        error, threads = steps.compile_eval(error_fn, state, mesh), settings.threads

        def errors(state: states.State) -> np.ndarray:
            averaged = ema.averaged(state["opt"])
            return recipe.over(
                lambda batch: error(averaged, state["stats"], batch),
                self.valid,
                local,
                threads,
                mesh,
            )

        checkpoints = Checkpoints(self.workdir / "checkpoints")
        begun = checkpoints.latest() or 0
        this, count = jax.process_index(), jax.process_count()
        trainer = loop.Trainer(
            step=steps.compile_step(step, state, mesh),
            batches=loader.train_loader(
                sources, settings.weights, local, seed, this, count, threads
            ),
            evaluate=lambda state: {"valid/loss": float(errors(state).mean())},
            checkpoints=checkpoints,
            log=log.MetricsLog(self.workdir, begun, plan.steps, self.batch_size),
            mesh=mesh,
            key=jax.random.key(seed),
            plan=plan,
            record_keys=lambda index: loader.record_keys(sources, index),
        )
        state = recipe.run(trainer, state)
        return meshes.to_host(ema.averaged(state["opt"])), errors(state)
