"""Pre-training of an image and a text encoder on pairs, and how well they then find each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medsyn_jax.core import config as checks
from medsyn_jax.core import log, metrics
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import transforms
from medsyn_jax.data.loading import loader
from medsyn_jax.data.text import reports, tokenizers
from medsyn_jax.models import encoder_configs, towers
from medsyn_jax.models.layers import statistics
from medsyn_jax.models.towers import Embeddings
from medsyn_jax.models.weights import convert
from medsyn_jax.objectives import gloria, mgca
from medsyn_jax.objectives.contrastive import contrastive_loss, normalize
from medsyn_jax.train import architecture, corpus, loop, recipe
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.checkpoint import Checkpoints
from medsyn_jax.train.state import State

# What may differ between two starts of one run: where it computes, not what. `text.pooler` is a
# setting of earlier versions, for weights that nothing read.
FREE = ("mesh.", "data.threads", "ingest.workers", "train.log_every", "text.pooler")


def _convirt(e: Embeddings, mesh: Mesh | None, **settings: Any) -> tuple:
    del mesh
    return contrastive_loss(e.image, e.text, **settings)


def _gloria(
    e: Embeddings,
    mesh: Mesh | None,
    *,
    global_weight: float,
    local_weight: float,
    tau3: float,
    **settings: Any,
) -> tuple:
    whole, parts = gloria.global_loss(e.image, e.text, tau3=tau3)
    local, more = gloria.local_loss(*_regions_and_words(e), tau3=tau3, mesh=mesh, **settings)
    parts |= {f"local/{k}": v for k, v in more.items()}
    return global_weight * whole + local_weight * local, parts


def _gloria_similarity(e: Embeddings, settings: Mapping[str, Any]) -> jax.Array:
    taus = {k: settings[k] for k in ("tau1", "tau2")}
    return gloria.local_similarity(*_regions_and_words(e), **taus)


def _regions_and_words(e: Embeddings) -> tuple[jax.Array, jax.Array, jax.Array]:
    """With the mask of the words: [CLS] is one and [SEP] is none, as in the official code."""
    assert e.local is not None
    mask = jnp.arange(e.local.words.shape[1])[None] <= e.local.word_count[:, None]
    return jnp.asarray(e.local.regions), jnp.asarray(e.local.words), mask


def _mgca(e: Embeddings, mesh: Mesh | None, **settings: Any) -> tuple:
    """Words are those after [CLS], with [SEP], as in the official code."""
    del mesh
    assert e.local is not None
    assert e.prototypes is not None
    regions, words, looks = e.local.regions, e.local.words[:, 1:], e.local.region_attention
    mask = jnp.arange(words.shape[1])[None] <= e.local.word_count[:, None]
    looked = mgca.cls_weights(e.local.word_attention[:, :, 1:], mask)
    everywhere = jnp.ones(regions.shape[:2], bool)
    even = jnp.full(everywhere.shape, 1 / everywhere.shape[1])
    seen = even if looks is None else mgca.cls_weights(looks, everywhere)
    return mgca.mgca_loss(
        e.image, e.text, words, regions, mask, looked, seen, e.prototypes, **settings
    )


@dataclass(frozen=True)
class Method:
    """loss: (embeddings, the mesh that they are sharded over or None, **config.loss) -> (loss,
    metrics). local: whether it needs regions and words, prototypes: and these. similarity: of all
    images with all reports, beside that of their embeddings: (embeddings, config.loss) -> [n, n].
    """

    loss: Callable[..., tuple]
    local: bool = False
    prototypes: bool = False
    similarity: Callable[[Embeddings, Mapping[str, Any]], jax.Array] | None = None


METHODS = {
    "convirt": Method(_convirt),
    "gloria": Method(_gloria, local=True, similarity=_gloria_similarity),
    "mgca": Method(_mgca, local=True, prototypes=True),
}
TEMPERATURES = ("temperature", "token_temperature", "prototype_temperature", "epsilon")
TEMPERATURES += ("tau1", "tau2", "tau3", "iterations")
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
    _obey_folders(config)
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
    tx = recipe.optimizer(config.optim, params, plan.steps, len(data) // config.data.batch_size)
    key = jax.random.key(config.seed)
    state = states.create(make_model, tx, mesh, meshes.FSDP_RULES, key)
    state = _import_weights(config, state)
    log.say(f"{len(data)} training records, {plan.steps} steps; {states.summary(state)}")
    log.write_config(workdir, config, FREE)
    loss_fn = _loss_fn(config, structure, mesh)
    embed = steps.compile_eval(_embed_fn(config, structure), state, mesh)
    evaluation = Evaluation(config, embed, local, mesh)
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
        evaluate=lambda state: evaluation.validate(state, data.valid),
        checkpoints=checkpoints,
        log=log.MetricsLog(workdir, start, plan.steps, config.data.batch_size),
        mesh=mesh,
        key=key,
        plan=plan,
        record_keys=lambda index: loader.record_keys(data.train, index),
    )
    state = recipe.run(trainer, state)
    figures = evaluation.retrieval(state, data.test)
    log.write_results(workdir, "pretrain", {f"test/{k}": v for k, v in figures.items()})
    _export(workdir, state, config.image.kind)
    log.say_cost("done")


def _check(config: Any) -> None:
    """All that the config alone tells to be wrong, and the files that it names but nobody has."""
    checks.check_numbers(config, above_0=["augment.size"])  # a config of another task has none
    checks.check_choice("method", config.method, METHODS)
    checks.check_choice("dtype", config.dtype, DTYPES)
    loss = {
        f"loss.{k}": k in TEMPERATURES for k, x in config.loss.items() if not isinstance(x, bool)
    }
    above_0 = [f"data.{k}" for k in ("batch_size", "size", "tokens", "vocab_size")]
    above_0 += ["augment.aspect", "augment.zoom", "image.channels"]
    above_0 += ["text.mlp_width", "text.types", "text.eps"]
    above_0 += ["image.mlp_width", "image.size", "image.eps"] if config.image.kind == "vit" else []
    from_0 = ["seed", "data.threads", "image.upsample"]
    from_0 += [f"augment.{k}" for k in ("rotate", "shift", "jitter", "blur")]
    checks.check_numbers(
        config,
        above_0=[*above_0, *(k for k, temperature in loss.items() if temperature)],
        from_0=[*from_0, *(k for k, temperature in loss.items() if not temperature)],
        below_1=["text.dropout"],
        shares=["augment.flip", "image.mean"],
        parts=["augment.area", "image.std"],
        counts=["image.depths"] if config.image.kind == "resnet" else [],
    )
    checks.check_ranges(
        config, [f"augment.{k}" for k in ("area", "aspect", "zoom", "jitter", "blur")]
    )
    checks.check_texts(config, ["data.sources", "data.sections"])
    for section in config.data.sections:
        checks.check_choice("data.sections", section, (*reports.SECTION_NAMES, "report"))
    recipe.check(config)
    if config.loss.get("tau1", 0) > gloria.TAU1_MOST:
        raise UserError(
            f"config.loss.tau1: {config.loss.tau1}: give a number up to {gloria.TAU1_MOST}"
        )
    method, heads = METHODS[config.method], config.heads
    if method.local != heads.local or method.prototypes != (heads.prototypes > 0):
        raise UserError(
            f"config.heads: local {heads.local}, prototypes {heads.prototypes}: {config.method} "
            f"{'needs' if method.local else 'has no'} local heads and "
            f"{'needs' if method.prototypes else 'has no'} prototypes"
        )
    architecture.check(config)
    seen = config.image.upsample or config.augment.size
    if config.image.kind == "vit" and config.image.size != seen:
        raise UserError(
            f"config.image.size: {config.image.size}: the ViT is given images of {seen} pixels "
            "(config.augment.size, or config.image.upsample): make both the same"
        )
    sources, weights = config.data.sources, config.data.weights
    loader.check_weights(weights, len(sources))
    if config.data.tokens > config.text.max_length:
        raise UserError(
            f"config.data.tokens: {config.data.tokens} is more than the text encoder's "
            f"config.text.max_length {config.text.max_length}"
        )
    named = {"data.tokenizer": config.data.tokenizer}
    named |= {f"{part}.weights": config[part].weights for part in ("image", "text")}
    if jax.process_index() == 0:  # the only one that reads them
        named |= {f"data.sources[{i}]": s for i, s in enumerate(sources) if s != "phantom"}
    checks.check_files(named)


def _obey_folders(config: Any) -> None:
    """UserError where a folder of weights says otherwise than the config; takes its epsilon."""
    for part in ("image", "text"):
        if path := config[part].weights:
            settings, where = config[part].to_dict(), f"config.{part}"
            settings = encoder_configs.agreed(path, settings, part=where, report=log.say)
            config[part].update({k: v for k, v in settings.items() if k == "eps"})


def _data(config: Any, workdir: Path) -> Data:
    """Ingest what is not ingested yet, and open it."""
    settings = config.data
    root = workdir.parent / "data"
    folders = [
        corpus.prepare(named, config.ingest, root, f"source {i}")
        for i, named in enumerate(settings.sources)
    ]
    words = (settings.sections, settings.vocab_size, settings.tokens)
    named = settings.tokenizer or corpus.tokenizer(workdir / "tokenizer", folders, *words)
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
            words=config.heads.local,
        )

    train = [source(folder, "train") for folder in folders]
    data = Data(train, source(folders[0], "valid"), source(folders[0], "test"), tokenizer)
    corpus.check_leaks(list(zip(settings.sources, train, strict=True)), (data.valid, data.test))
    for name, part in zip(settings.sources, train, strict=True):
        corpus.say_losses(f"config.data.sources: {name}", part)
    if len(settings.sources) > 1:
        said = "early stopping and figures rest on the valid and test splits of the first source"
        log.say(f"{said} alone: {settings.sources[0]}")
    return data


def _import_weights(config: Any, state: State) -> State:
    """Put the weight files that the config names in the place of the random start."""
    for part in ("image", "text"):
        settings = config[part]
        if not settings.weights:
            continue
        old = state["params"][part], state["stats"].get(part, {})
        layers = settings.layers if settings.get("truncate") else None
        named = settings.weights, settings.layout
        new = convert.load(*named, *old, layers=layers, report=log.say)
        params, stats = (states.replace(a, b) for a, b in zip(old, new, strict=True))
        state["params"][part] = params
        if stats:
            state["stats"][part] = stats
    return state


def _loss_fn(config: Any, structure: Any, mesh: Mesh) -> steps.LossFn:
    method, settings = METHODS[config.method].loss, dict(config.loss)
    pixels = {k: config.image[k] for k in transforms.PIXELS}

    def loss_fn(params: Any, stats: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple:
        for_view, for_dropout = jax.random.split(key)
        model = nnx.merge(structure, params, stats, copy=True)
        images = transforms.augment(for_view, batch["image"], **config.augment, **pixels)
        texts = batch["ids"], batch["mask"], batch.get("words")
        loss, extra = method(model(images, *texts, train=True, key=for_dropout), mesh, **settings)
        return loss, (statistics(model), extra)

    return loss_fn


def _embed_fn(config: Any, structure: Any) -> Callable:
    """fn(params, stats, batch) -> Embeddings of the middle of the images, without dropout; what
    retrieval compares, image and text, of unit norm in fp32."""
    pixels = {k: config.image[k] for k in transforms.PIXELS}

    def fn(params: Any, stats: Any, batch: dict[str, jax.Array]) -> Embeddings:
        model = nnx.merge(structure, params, stats, copy=True)
        images = transforms.center_crop(batch["image"], config.augment.size)
        images = transforms.normalize(images, **pixels)
        e = model(images, batch["ids"], batch["mask"], batch.get("words"), train=False)
        return e._replace(image=normalize(e.image), text=normalize(e.text), prototypes=None)

    return fn


@dataclass
class Evaluation:
    """What a run computes of a whole split: of `local` records a step on this process."""

    config: Any
    embed: Callable[..., Embeddings]
    local: int
    mesh: Mesh

    def embeddings(self, state: State, source: loader.Source) -> Embeddings:
        """Of all records in their order, NumPy, on every process; `prototypes` as they are."""
        found = recipe.over(
            lambda batch: self.embed(state["params"], state["stats"], batch),
            source,
            self.local,
            self.config.data.threads,
            self.mesh,
        )
        return found._replace(prototypes=state["params"].get("prototypes"))

    def validate(self, state: State, source: loader.Source) -> Mapping[str, float]:
        """The objective over the whole split at once, or, where it compares regions with words,
        the mean over its batches; and recall@1 both ways."""
        c, e = self.config, self.embeddings(state, source)
        loss = METHODS[c.method].loss
        count, size = len(e.image), c.data.batch_size if c.heads.local else len(e.image)
        cuts = range(0, max(count - size, 0) + 1, size)  # whole batches alone, if there is one
        losses = [loss(_rows(e, slice(i, i + size)), None, **c.loss)[0] for i in cuts]
        texts, scores = np.array(source.texts()), np.asarray(e.image) @ np.asarray(e.text).T
        found = metrics.retrieval(scores, texts, ks=(1,), resamples=1)
        names = ("image_to_text/recall@1", "text_to_image/recall@1")
        return {"valid/loss": float(np.mean(jax.device_get(losses)))} | {
            f"valid/{k}": float(found[k]["value"] or 0) for k in names
        }

    def retrieval(self, state: State, source: loader.Source) -> dict[str, dict[str, Any]]:
        """By the similarity of whole images and reports, and, if the method has one, by that of
        regions and words and by the mean of both, each standardised over the images."""
        e, c = self.embeddings(state, source), self.config
        texts, subjects = np.array(source.texts()), np.array(source.subjects())
        kinds = {"": np.asarray(e.image) @ np.asarray(e.text).T}
        similarity = METHODS[c.method].similarity
        if similarity is not None:
            size = c.data.batch_size  # not all regions at once: MIMIC-CXR's test split has 6 GB
            parts = (_with_regions(e, slice(i, i + size)) for i in range(0, len(texts), size))
            kinds["local/"] = np.concatenate([similarity(part, c.loss) for part in parts])
            both = [(x - x.mean(0)) / np.maximum(x.std(0), 1e-12) for x in kinds.values()]
            kinds["mixed/"] = np.mean(both, 0)
        return {
            f"{kind}{name}": dict(figure)
            for kind, scores in kinds.items()
            for name, figure in metrics.retrieval(scores, texts, subjects).items()
        }


def _rows(e: Embeddings, rows: slice) -> Embeddings:
    """Some of the records, on the device."""
    some = jax.tree.map(lambda x: jnp.asarray(x[rows]), e._replace(prototypes=None))
    return some._replace(prototypes=e.prototypes)


def _with_regions(e: Embeddings, rows: slice) -> Embeddings:
    """The regions of some of the images, and all words."""
    assert e.local is not None
    return e._replace(local=e.local._replace(regions=e.local.regions[rows]))


def _export(workdir: Path, state: State, kind: str) -> None:
    """The encoders of the best checkpoint in the layouts that other programs read."""
    image = {"resnet": "torchvision", "vit": "timm_vit"}[kind]
    for part, layout in (("image", image), ("text", "hf_bert")):
        params, stats = meshes.to_host((state["params"][part], state["stats"].get(part, {})))
        if jax.process_index() == 0:
            convert.save(workdir / "encoders" / f"{part}.safetensors", layout, params, stats)
