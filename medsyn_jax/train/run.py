"""A training run: from the sections of a config to the best state.

Every training task is assembled here: `prepare` makes the shards, `Data` opens them,
`Training.fit` trains a placed state, and `fit_averaged` trains parameters, with an exponential
moving average of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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
from medsyn_jax.data.text import reports, tokenizers
from medsyn_jax.train import corpus, ema, frozen, loop
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.checkpoint import Checkpoints
from medsyn_jax.train.state import State

# Fields that may differ between two starts of one run: they do not change its results.
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
        checks.numbers("from 0", train, "patience steps"),
        checks.numbers("below 1", update, "b1 b2"),
        checks.numbers("share", update, "warmup"),
        checks.texts(update, "frozen held unit_rows"),
    )


def _check_weights(config: Any) -> None:
    loader.check_weights(config.data.weights, len(config.data.sources))


# Checks of the sections that `prepare`, `Data` and `Training` read.
RULES = (
    checks.choice("dtype", checks.DTYPES),
    checks.numbers("above 0", "data", "batch_size size tokens vocab_size"),
    checks.numbers("from 0", "", "seed"),
    checks.numbers("from 0", "data", "threads"),
    checks.texts("data", "sources sections"),
    checks.choices("data.sections", (*reports.SECTION_NAMES, "report")),
    *rules(),
    _check_weights,
)


class Data:
    """The sources of a run as model inputs.

    Attributes:
        tokenizer: of all texts.
        train: the training split of each source.
        held_out: splits of the first source that are never trained on, by name.
    """

    def __init__(
        self,
        settings: Any,
        folders: Sequence[Path],
        tokenizer: tokenizers.Tokenizer,
        held_out: Sequence[str],
        **options: bool,
    ):
        """settings: section `data` of a config. folders: of shards. options: of `loader.Source`.
        Raises UserError for a split without records."""
        self.tokenizer = tokenizer
        texts = (settings.sections, tokenizer, settings.tokens)

        def source(folder: Path, split: str) -> loader.Source:
            return loader.Source(folder, split, *texts, settings.size, **options)

        self.train = [source(folder, "train") for folder in folders]
        self.held_out = {split: source(folders[0], split) for split in held_out}


def prepare(
    config: Any, workdir: Path, tokenizer: str | Path
) -> tuple[list[Path], tokenizers.Tokenizer]:
    """Folders of shards of `config.data.sources`, ingested where necessary, and the tokenizer.

    tokenizer: its folder; if empty, a WordPiece is trained on the reports and kept in `workdir`.
    Raises UserError for a source that trains on held-out subjects of the first one.
    """
    settings = config.data
    folders = [
        corpus.prepare(name, config.ingest, workdir.parent / "data", f"source {i}")
        for i, name in enumerate(settings.sources)
    ]
    corpus.check_leaks(settings.sources, folders)
    words = (settings.sections, settings.vocab_size, settings.tokens)
    folder = tokenizer or corpus.tokenizer(workdir / "tokenizer", folders, *words)
    return folders, tokenizers.load(folder)


@dataclass(frozen=True)
class Training:
    """One training: its settings, its data, and where it computes and writes.

    Attributes:
        config: of the run; `seed`, `data.threads` and `data.weights` count.
        section: with `optim` and `train` (and `ema`): the config itself, or one stage of it.
        batch_size: records a step over all devices.
        data: the sources.
        workdir: for checkpoints and metrics.
        mesh: the devices.
    """

    config: Any
    section: Any
    batch_size: int
    data: Data
    workdir: Path
    mesh: Mesh

    @property
    def records(self) -> int:
        """Number of training records of all sources."""
        return sum(len(source) for source in self.data.train)

    @cached_property
    def plan(self) -> loop.Plan:
        """Length and intervals; UserError if a batch is larger than all records together."""
        return make_plan(self.section.train, self.records, self.batch_size)

    def optimizer(self, params: Any) -> optax.GradientTransformation:
        """AdamW of the `optim` section for `params` (arrays or shapes)."""
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

        evaluate: metrics of a state; the state with the lowest `loop.SCORE` is the best.
        """
        optim, settings, seed = self.section.optim, self.config.data, self.config.seed
        sources = self.data.train
        local = meshes.per_process(self.batch_size, self.mesh, optim.accumulate)
        this, count = jax.process_index(), jax.process_count()
        checkpoints = Checkpoints(self.workdir / "checkpoints")
        start = checkpoints.latest() or 0
        step = steps.make_step(loss_fn, tx, optim.accumulate, tuple(optim.frozen))
        trainer = loop.Trainer(
            step=steps.compile_step(step, state, self.mesh),
            batches=loader.train_loader(
                sources, settings.weights, local, seed, this, count, settings.threads
            ),
            evaluate=evaluate,
            checkpoints=checkpoints,
            log=outputs.MetricsLog(self.workdir, start, self.plan.steps, self.batch_size),
            mesh=self.mesh,
            key=jax.random.key(seed),
            plan=self.plan,
            record_keys=partial(loader.record_keys, sources),
        )
        try:
            state = loop.fit(trainer, loop.resume(trainer, state))
        finally:
            trainer.log.close()
            trainer.batches.close()
            checkpoints.wait()  # finish a save that has begun, whatever ended the loop
        best = checkpoints.best() or self.plan.steps
        log.say(trainer.progress.summary(best, self.plan.steps))
        state = checkpoints.restore(best, state)
        checkpoints.close()
        return state

    def say_size(self, state: State) -> None:
        """Print the numbers of records, steps and parameters."""
        size = states.summary(state)
        log.say(f"{self.records} training records, {self.plan.steps} steps; {size}")


def fit_averaged(
    training: Training, params: Any, constants: Any, loss_fn: steps.LossFn, error_fn: Callable
) -> tuple[Any, np.ndarray]:
    """(averaged parameters on the host, validation error of each record) of the best state.

    params, constants: trained and other parameters (NumPy). error_fn: (params, constants, batch) ->
    errors [b], whose mean over the "valid" split chooses the best state.
    """
    tx = ema.keep_average(training.optimizer(params), training.section.ema)
    state = states.place(params, constants, tx, training.mesh, meshes.FSDP_RULES)
    training.say_size(state)
    error = steps.compile_eval(error_fn, state, training.mesh)

    def errors(state: State) -> np.ndarray:
        averaged = ema.averaged(state["opt"])
        return frozen.over(
            lambda batch: error(averaged, state["stats"], batch),
            training.data.held_out["valid"],
            training.mesh,
            training.batch_size,
            training.config.data.threads,
        )

    def evaluate(state: State) -> dict[str, float]:
        return {loop.SCORE: float(errors(state).mean())}

    state = training.fit(state, tx, loss_fn, evaluate)
    return meshes.to_host(ema.averaged(state["opt"])), errors(state)


def make_plan(train: Any, records: int, batch_size: int) -> loop.Plan:
    """The plan in steps of a `train` section, which counts in epochs of `records`.

    Raises UserError if a batch is larger than all records together, and for too many steps.
    """
    per_epoch = records // batch_size
    if not per_epoch:
        raise UserError(
            f"config.data.batch_size: {batch_size} is more than the {records} training records: "
            "use a smaller one"
        )
    if train.epochs * per_epoch > _MOST_STEPS:
        raise UserError(f"config.train.epochs: {train.epochs}: is more than {_MOST_STEPS} steps")
    steps = train.steps or _steps(train.epochs * per_epoch)
    if steps < _FEW_STEPS:
        log.say(
            f"only {steps} training steps ({steps / per_epoch:.3g} epochs of {records} records by "
            f"{batch_size}): networks stay nearly as they start: raise --config.train.epochs or "
            f"use smaller batches, for {_FEW_STEPS} steps or more"
        )
    return loop.Plan(
        steps=steps,
        eval_every=_steps(per_epoch / train.evals_per_epoch),
        checkpoint_every=_steps(per_epoch / train.checkpoints_per_epoch),
        log_every=train.log_every,
        patience=train.patience,
    )


def _steps(number: float) -> int:
    return max(1, round(min(number, _MOST_STEPS)))
