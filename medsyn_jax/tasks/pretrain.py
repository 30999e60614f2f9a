"""Pre-training of an image and a text encoder on image-report pairs, evaluated by retrieval."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from medsyn_jax.core import checks, log, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import transforms
from medsyn_jax.models import encoder_configs, resnet, towers
from medsyn_jax.models.heads import HEADS
from medsyn_jax.models.layers import statistics
from medsyn_jax.models.towers import Embeddings
from medsyn_jax.models.weights import convert
from medsyn_jax.objectives import gloria, mgca
from medsyn_jax.objectives.contrastive import contrastive_loss, normalize
from medsyn_jax.train import corpus, frozen
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.retrieval import Evaluation
from medsyn_jax.train.run import FREE as FREE
from medsyn_jax.train.run import RULES, Data, Training, prepare
from medsyn_jax.train.state import State


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


def _gloria_similarity(e: Embeddings, settings: Any) -> jax.Array:
    taus = {k: settings[k] for k in ("tau1", "tau2")}
    return gloria.local_similarity(*_regions_and_words(e), **taus)


def _regions_and_words(e: Embeddings) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Regions, words, and the words' mask with [CLS] and without [SEP] (the official code's)."""
    assert e.local is not None
    mask = jnp.arange(e.local.words.shape[1])[None] <= e.local.word_count[:, None]
    return jnp.asarray(e.local.regions), jnp.asarray(e.local.words), mask


def _mgca(e: Embeddings, mesh: Mesh | None, **settings: Any) -> tuple:
    """MGCA; its words begin after [CLS] and end with [SEP], as in the official code."""
    del mesh
    assert e.local is not None
    assert e.prototypes is not None
    regions, words = e.local.regions, e.local.words[:, 1:]
    mask = jnp.arange(words.shape[1])[None] <= e.local.word_count[:, None]
    word_weights = mgca.cls_weights(e.local.word_attention[:, :, 1:], mask)
    if e.local.region_attention is None:
        region_weights = jnp.full(regions.shape[:2], 1 / regions.shape[1])
    else:
        every = jnp.ones(regions.shape[:2], bool)
        region_weights = mgca.cls_weights(e.local.region_attention, every)
    weights = (word_weights, region_weights)
    return mgca.mgca_loss(e.image, e.text, words, regions, mask, *weights, e.prototypes, **settings)


@dataclass(frozen=True)
class Method:
    """A pre-training objective.

    Attributes:
        loss: (embeddings, mesh of their shards or None, **config.loss) -> (loss, metrics).
        local: whether the loss needs regions and words.
        prototypes: whether the loss needs prototypes.
        similarity: (embeddings, config.loss) -> [n, n], images with reports by regions and words;
            None for a method that compares only whole images and reports.
    """

    loss: Callable[..., tuple]
    local: bool = False
    prototypes: bool = False
    similarity: Callable[[Embeddings, Any], jax.Array] | None = None


METHODS = {
    "convirt": Method(_convirt),
    "gloria": Method(_gloria, local=True, similarity=_gloria_similarity),
    "mgca": Method(_mgca, local=True, prototypes=True),
}


def run(config: Any, workdir: Path) -> None:
    """Train to the lowest validation loss; write figures of retrieval and the encoders."""
    mesh = meshes.make_mesh(**config.mesh)
    meshes.per_process(config.data.batch_size, mesh, config.optim.accumulate)
    data = _data(config, workdir)
    training = Training(config, config, config.data.batch_size, data, workdir, mesh)
    make_model = frozen.pair_maker(config.to_dict(), data.tokenizer)
    structure, params, _ = states.shapes(make_model)
    tx = training.optimizer(params)
    state = states.create(make_model, tx, mesh, meshes.FSDP_RULES, jax.random.key(config.seed))
    state = _import_weights(config, state)
    training.say_size(state)
    outputs.write_config(workdir, config)
    embed = steps.compile_eval(_embed_fn(config, structure), state, mesh)
    method = METHODS[config.method]
    evaluation = Evaluation(config, embed, method.loss, method.similarity, mesh)
    loss_fn = _loss_fn(config, structure, mesh)
    valid, test = data.held_out["valid"], data.held_out["test"]
    state = training.fit(state, tx, loss_fn, lambda state: evaluation.validate(state, valid))
    figures = evaluation.retrieval(state, test)
    outputs.write_results(workdir, "pretrain", {f"test/{k}": v for k, v in figures.items()})
    _export(workdir, state, config.image.kind)
    log.say_cost("done")


def _check_method(config: Any) -> None:
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


def _check_image(config: Any) -> None:
    image, side = config.image, config.image.upsample or config.augment.size
    if image.kind == "resnet":
        checks.numbers("count", "image", "depths")(config)
        checks.choice("image.block", get_args(resnet.Block))(config)
        checks.choice("image.stem", get_args(resnet.Stem))(config)
        if len(image.depths) != 4:
            raise UserError(
                f"config.image.depths: {image.depths}: give the number of blocks of each of the "
                "four stages, such as (3, 4, 6, 3)"
            )
        return
    checks.numbers("above 0", "image", "size patch layers heads mlp_width eps")(config)
    if image.size % image.patch:
        raise UserError(
            f"config.image.patch: {image.patch} does not divide config.image.size {image.size}: "
            "change one of the two"
        )
    if image.size != side:
        raise UserError(
            f"config.image.size: {image.size}: the ViT gets images of {side} pixels "
            "(config.augment.size, or config.image.upsample): make both the same"
        )


def _check_encoders(config: Any) -> None:
    text, heads = config.text, config.heads
    for name in ("text", "image") if config.image.kind == "vit" else ("text",):
        width, count = config[name].width, config[name].heads
        if width % count:
            raise UserError(
                f"config.{name}.heads: {count} do not divide config.{name}.width {width}: "
                "change one of the two"
            )
    if text.summed > text.layers:
        raise UserError(
            f"config.text.summed: {text.summed} is more than config.text.layers {text.layers}: "
            "give at most the number of layers"
        )
    if config.data.tokens > text.max_length:
        raise UserError(
            f"config.data.tokens: {config.data.tokens} is more than the text encoder's "
            f"config.text.max_length {text.max_length}"
        )
    if heads.kind != "linear":
        checks.numbers("above 0", "heads", "hidden")(config)
    if not heads.text and text.width != heads.width:
        raise UserError(
            f"config.heads.text: without a head for the text config.heads.width {heads.width} "
            f"must be config.text.width {text.width}"
        )
    if heads.prototypes < 0 or heads.prototypes == 1:
        raise UserError(
            f"config.heads.prototypes: {heads.prototypes}: give 2 or more, or 0 for none"
        )


def _files(config: Any) -> dict[str, str]:
    paths = {"data.tokenizer": config.data.tokenizer}
    paths |= {f"{part}.weights": config[part].weights for part in ("image", "text")}
    return paths | corpus.files(config)


def _agree_with_folders(config: Any) -> None:
    """Take the epsilon of folders of weights; UserError where one contradicts the config."""
    for part in ("image", "text"):
        if path := config[part].weights:
            settings, where = config[part].to_dict(), f"config.{part}"
            settings = encoder_configs.agreed(path, settings, part=where, report=log.say)
            config[part].update({k: v for k, v in settings.items() if k == "eps"})


CHECKS = (
    checks.numbers("above 0", "augment", "size"),  # which a config of another task lacks
    checks.choice("method", METHODS),
    checks.numbers(
        "above 0", "image", "channels width mlp_width? size? eps? heads? layers? patch?"
    ),
    checks.numbers("above 0", "text", "width heads mlp_width types eps max_length summed"),
    checks.numbers("above 0", "heads", "width"),
    checks.numbers("above 0", "loss", "temperature? token_temperature? prototype_temperature?"),
    checks.numbers("above 0", "loss", "tau1? tau2? tau3? epsilon? iterations?"),
    checks.numbers("from 0", "loss", "image_to_text? text_to_image? global_weight? local_weight?"),
    checks.numbers("from 0", "loss", "instance_weight? token_weight? prototype_weight?"),
    checks.numbers("from 0", "image", "upsample"),
    *transforms.rules("augment"),
    checks.numbers("below 1", "text", "dropout"),
    checks.numbers("share", "image", "mean"),
    checks.numbers("part", "image", "std"),
    checks.choice("image.kind", towers.IMAGE_ENCODERS),
    checks.choice("text.pooling", towers.POOLINGS),
    checks.choice("heads.kind", HEADS),
    *RULES,
    _check_method,
    _check_image,
    _check_encoders,
    checks.files(_files),
    _agree_with_folders,
)


def _data(config: Any, workdir: Path) -> Data:
    """Open all sources; a line for each whose texts are cut or hold words without a piece."""
    folders, tokenizer = prepare(config, workdir, config.data.tokenizer)
    options = {"random_sentence": config.data.random_sentence, "words": config.heads.local}
    data = Data(config.data, folders, tokenizer, ("valid", "test"), **options)
    for name, source in zip(config.data.sources, data.train, strict=True):
        corpus.say_losses(f"config.data.sources: {name}", source)
    if len(data.train) > 1:
        log.say(
            "early stopping and figures rest on the valid and test splits of the first source "
            f"alone: {config.data.sources[0]}"
        )
    return data


def _import_weights(config: Any, state: State) -> State:
    """Replace random initial weights by those of the files in the config."""
    for part in ("image", "text"):
        settings = config[part]
        if not settings.weights:
            continue
        old = state["params"][part], state["stats"].get(part, {})
        layers = settings.layers if settings.get("truncate") else None
        file = (settings.weights, settings.layout)
        new = convert.load(*file, *old, layers=layers, report=log.say)
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
    """fn(params, stats, batch) -> Embeddings of center crops, without dropout.

    `image` and `text` have unit norm in fp32.
    """
    pixels = {k: config.image[k] for k in transforms.PIXELS}

    def fn(params: Any, stats: Any, batch: dict[str, jax.Array]) -> Embeddings:
        model = nnx.merge(structure, params, stats, copy=True)
        images = transforms.center_crop(batch["image"], config.augment.size)
        images = transforms.normalize(images, **pixels)
        e = model(images, batch["ids"], batch["mask"], batch.get("words"), train=False)
        return e._replace(image=normalize(e.image), text=normalize(e.text), prototypes=None)

    return fn


def _export(workdir: Path, state: State, kind: str) -> None:
    """Write the encoders of the best checkpoint in layouts of other programs."""
    image = {"resnet": "torchvision", "vit": "timm_vit"}[kind]
    for part, layout in (("image", image), ("text", "hf_bert")):
        params, stats = meshes.to_host((state["params"][part], state["stats"].get(part, {})))
        if jax.process_index() == 0:
            convert.save(workdir / "encoders" / f"{part}.safetensors", layout, params, stats)
