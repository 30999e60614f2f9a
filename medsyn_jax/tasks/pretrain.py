"""Pre-training of an image and a text encoder on pairs, and how well they then find each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medsyn_jax.core import log, metrics
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.config import check_choice, check_files, check_numbers
from medsyn_jax.core.errors import UserError
from medsyn_jax.data import loader, tokenizers, transforms
from medsyn_jax.models import towers, weights
from medsyn_jax.models.layers import statistics
from medsyn_jax.objectives.contrastive import contrastive_loss, normalize
from medsyn_jax.train import corpus, loop, recipe
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.checkpoint import Checkpoints
from medsyn_jax.train.state import State

# What may differ between two starts of one run: where it computes, not what.
FREE = ("mesh.", "data.threads", "ingest.workers", "train.log_every")

# A method says how the outputs of its model become (loss, metrics).
METHODS: dict[str, Callable[..., tuple]] = {"convirt": contrastive_loss}
DTYPES = ("float32", "bfloat16")


@dataclass
class Data:
    """What a run reads: `valid` and `test` are of the first source, never trained on."""

    train: list[loader.Source]
    valid: loader.Source
    test: loader.Source
    tokenizer: tokenizers.Tokenizer

    def __len__(self) -> int:
        return sum(len(source) for source in self.train)


def run(config: Any, workdir: Path) -> None:
    """Train, keep the checkpoint with the lowest validation loss, and write retrieval figures."""
    _check(config)
    log.check_config(workdir, config, FREE)
    mesh = meshes.make_mesh(**config.mesh)
    local = meshes.per_process(config.data.batch_size, mesh, config.optim.accumulate)
    data = _data(config, workdir)
    plan = recipe.plan(config.train, len(data), config.data.batch_size)

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        vocab, dtype = data.tokenizer.vocab_size, jnp.dtype(config.dtype)
        image, text, heads = (config[part].to_dict() for part in ("image", "text", "heads"))
        return towers.PairEncoder(image, text, heads, vocab, dtype=dtype, rngs=rngs)

    structure, params, _ = states.shapes(make_model)
    tx = recipe.optimizer(config.optim, params, plan.steps)
    key = jax.random.key(config.seed)
    state = states.create(make_model, tx, mesh, meshes.FSDP_RULES, key)
    state = _import_weights(config, state)
    log.say(f"{len(data)} training records, {plan.steps} steps; {states.summary(state)}")
    log.write_config(workdir, config, FREE)
    loss_fn = _loss_fn(config, structure)
    embed = steps.compile_eval(_embed_fn(config, structure), state, mesh)
    checkpoints = Checkpoints(workdir / "checkpoints")
    start = checkpoints.latest() or 0
    batches = loader.train_loader(
        data.train,
        config.data.weights,
        local,
        config.seed,
        jax.process_index(),
        jax.process_count(),
        config.data.threads,
    )
    step = steps.make_step(loss_fn, tx, config.optim.accumulate, tuple(config.optim.frozen))
    trainer = loop.Trainer(
        step=steps.compile_step(step, state, mesh),
        batches=batches,
        evaluate=lambda state: _validate(config, embed, state, data.valid, local, mesh),
        checkpoints=checkpoints,
        log=log.MetricsLog(workdir, start, plan.steps, config.data.batch_size),
        mesh=mesh,
        key=key,
        plan=plan,
        record_keys=lambda index: loader.record_keys(data.train, index),
    )
    state = recipe.run(trainer, state)
    embedded = _embed_all(embed, state, data.test, local, config.data.threads, mesh)
    figures = metrics.retrieval(
        embedded["image"] @ embedded["text"].T,
        embedded["reports"],
        embedded["subjects"],
    )
    log.write_results(workdir, "pretrain", {f"test/{k}": dict(v) for k, v in figures.items()})
    _export(workdir, state)
    log.say_cost("done")


def _check(config: Any) -> None:
    """All that the config alone tells to be wrong, and the files that it names but nobody has."""
    check_choice("method", config.method, METHODS)
    check_choice("dtype", config.dtype, DTYPES)
    above_0 = ("data.batch_size", "data.size", "data.tokens", "augment.size", "loss.temperature")
    above_0 += ("optim.accumulate", "train.epochs", "train.evals_per_epoch")
    above_0 += ("train.checkpoints_per_epoch", "train.log_every")
    check_numbers(config, above_0, from_0=("data.threads", "train.patience", "optim.warmup"))
    towers.check(*(config[part].to_dict() for part in ("image", "text", "heads")))
    sources, weights = config.data.sources, config.data.weights
    if len(sources) != len(weights):
        raise UserError(
            f"config.data.weights: {len(weights)} weights for {len(sources)} sources: "
            "give one for each"
        )
    if config.data.tokens > config.text.max_length:
        raise UserError(
            f"config.data.tokens: {config.data.tokens} is more than the text encoder's "
            f"config.text.max_length {config.text.max_length}"
        )
    named = {"data.tokenizer": config.data.tokenizer}
    named |= {f"{part}.weights": config[part].weights for part in ("image", "text")}
    if jax.process_index() == 0:  # the only one that reads them
        named |= {f"data.sources[{i}]": s for i, s in enumerate(sources) if s != "phantom"}
    check_files(named)


def _data(config: Any, workdir: Path) -> Data:
    """Ingest what is not ingested yet, and open it."""
    settings = config.data
    root = workdir.parent / "data"
    folders = [
        corpus.prepare(named, config.ingest, root, f"source {i}")
        for i, named in enumerate(settings.sources)
    ]
    words = (settings.sections, settings.vocab_size, settings.tokens)
    named = settings.tokenizer or corpus.tokenizer(workdir / "tokenizer", folders[0], *words)
    tokenizer = tokenizers.load(named)

    def source(folder: Path, split: str) -> loader.Source:
        return loader.Source(
            folder,
            split,
            settings.sections,
            tokenizer,
            settings.tokens,
            settings.size,
            random_sentence=settings.random_sentence,
        )

    train = [source(folder, "train") for folder in folders]
    data = Data(train, source(folders[0], "valid"), source(folders[0], "test"), tokenizer)
    _check_leaks(data, settings.sources)
    return data


def _check_leaks(data: Data, names: Sequence[str]) -> None:
    """No source may train on a subject that the first one holds out, under whatever split."""
    held = {*data.valid.subjects(), *data.test.subjects()} if len(names) > 1 else set()
    for name, source in zip(names[1:], data.train[1:], strict=True):
        both = sorted(held.intersection(source.subjects()))
        if both:
            raise UserError(
                f"config.data.sources: {name} trains on {len(both)} subjects, such as {both[0]}, "
                f"that {names[0]} holds out for validation or test: ingest it with the same splits"
            )


def _import_weights(config: Any, state: State) -> State:
    """Put the weight files that the config names in the place of the random start."""
    for part in ("image", "text"):
        settings = config[part]
        if not settings.weights:
            continue
        old = state["params"][part], state["stats"].get(part, {})
        new = weights.load(settings.weights, settings.layout, *old, report=log.say)
        params, stats = (states.replace(a, b) for a, b in zip(old, new, strict=True))
        state["params"][part] = params
        if stats:
            state["stats"][part] = stats
    return state


def _loss_fn(config: Any, structure: Any) -> steps.LossFn:
    method, settings = METHODS[config.method], dict(config.loss)
    pixels = {k: config.image[k] for k in ("mean", "std", "channels")}

    def loss_fn(params: Any, stats: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple:
        for_view, for_dropout = jax.random.split(key)
        model = nnx.merge(structure, params, stats, copy=True)
        images = transforms.augment(for_view, batch["image"], **config.augment, **pixels)
        outputs = model(images, batch["ids"], batch["mask"], train=True, key=for_dropout)
        loss, extra = method(*outputs, **settings)
        return loss, (statistics(model), extra)

    return loss_fn


def _embed_fn(config: Any, structure: Any) -> Callable:
    """fn(params, stats, batch) -> (image, text) embeddings of unit norm, fp32, without dropout."""
    pixels = {k: config.image[k] for k in ("mean", "std", "channels")}

    def fn(params: Any, stats: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(structure, params, stats, copy=True)
        images = transforms.center_crop(batch["image"], config.augment.size)
        images = transforms.normalize(images, **pixels)
        image, text = model(images, batch["ids"], batch["mask"], train=False)
        return normalize(image), normalize(text)

    return fn


def _embed_all(
    embed: Callable, state: State, source: loader.Source, local: int, threads: int, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Embeddings [n, d] of a whole split in its order, with its reports and subjects."""
    found = recipe.over(
        lambda batch: embed(state["params"], state["stats"], batch), source, local, threads, mesh
    )
    whole = dict(zip(("image", "text"), found, strict=True))
    return whole | {"reports": np.array(source.texts()), "subjects": np.array(source.subjects())}


def _validate(
    config: Any, embed: Callable, state: State, source: loader.Source, local: int, mesh: Mesh
) -> Mapping[str, float]:
    """The objective over the whole validation split at once, and recall@1 both ways."""
    e = _embed_all(embed, state, source, local, config.data.threads, mesh)
    loss, _ = METHODS[config.method](jnp.asarray(e["image"]), jnp.asarray(e["text"]), **config.loss)
    found = metrics.retrieval(e["image"] @ e["text"].T, e["reports"], ks=(1,), resamples=1)
    names = ("image_to_text/recall@1", "text_to_image/recall@1")
    return {"valid/loss": float(loss)} | {
        f"valid/{k}": float(found[k]["value"] or 0) for k in names
    }


def _export(workdir: Path, state: State) -> None:
    """The encoders of the best checkpoint in the layouts that other programs read."""
    for part, layout in (("image", "torchvision"), ("text", "hf_bert")):
        params, stats = meshes.to_host((state["params"][part], state["stats"].get(part, {})))
        if jax.process_index() == 0:
            weights.save(workdir / "encoders" / f"{part}.safetensors", layout, params, stats)
