"""The linear probe: one linear layer on frozen features, the whole fit of all seeds in one jit.

Epochs, shuffling, validation and early stopping run on the device, so a fit of 5,000 records and
50 epochs costs seconds rather than 5,000 dispatches a seed.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from medsyn_jax.core import checks
from medsyn_jax.objectives import classify

Kind = Literal["multilabel", "multiclass"]
RULES = (
    checks.numbers("above 0", "probe", "learning_rate batch_size epochs patience"),
    checks.numbers("from 0", "probe", "weight_decay"),
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["learning_rate", "weight_decay", "epochs", "patience"],
    meta_fields=["kind", "batch_size", "standardize"],  # a change of these compiles anew
)
@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is fitted: AdamW with b1 .9, b2 .999, constant learning rate.

    patience: epochs without a better validation score after which a fit stops. standardize: scale
    every feature to mean 0 and variance 1 over the training records of the fit.
    """

    learning_rate: float | Array  # an array where the jit traces it, as the next three
    weight_decay: float | Array
    epochs: int | Array
    patience: int | Array
    kind: Kind
    batch_size: int
    standardize: bool


class Probe(NamedTuple):
    """Fitted layers of s seeds, for raw features, at the best epoch, and how they came about."""

    kernel: Float[Array, "s f c"]
    bias: Float[Array, "s c"]
    score: Float[Array, " s"]  # best validation score; -inf if no epoch gave a finite one
    best_epoch: Int[Array, " s"]  # from 1
    epochs: Int[Array, " s"]  # that were run


class _Loop(NamedTuple):
    layer: Any
    opt: Any
    best: Any
    score: Array
    best_epoch: Array
    epoch: Array


def score(logits: Float[Array, "n c"], labels: Shaped[Array, "n ..."], kind: Kind) -> Array:
    """What early stopping maximizes: mean AUROC over the labels (or of the second of two classes),
    accuracy for three classes and more. NaN where it is undefined."""
    if kind == "multilabel":
        return classify.mean_auroc(logits, labels)
    if logits.shape[1] == 2:
        return classify.mean_auroc(logits[:, 1:] - logits[:, :1], labels[:, None])
    return classify.mean_accuracy(logits, labels)


def logits(probe: Probe, features: Float[Array, "n f"]) -> Float[Array, "s n c"]:
    """Logits of every seed's layer."""
    exact = jax.lax.Precision.HIGHEST  # as in `fit`
    return jnp.einsum("nf,sfc->snc", features, probe.kernel, precision=exact) + probe.bias[:, None]


@partial(jax.jit, static_argnames="classes")
def fit(
    features: Float[Array, "n f"],
    labels: Shaped[Array, "n ..."],
    subsets: Int[Array, "s k"],
    valid_features: Float[Array, "m f"],
    valid_labels: Shaped[Array, "m ..."],
    keys: Key[Array, " s"],
    *,
    classes: int,
    settings: ProbeSettings,
) -> Probe:
    """Fit one linear layer a seed and keep each at its best validation epoch.

    labels: int8 [n, c] (1, 0, negative = left out) for "multilabel", int32 [n] (0 ... c - 1,
    negative = left out) for "multiclass". subsets: rows of `features` that each seed trains on,
    padded with -1. keys: of initialization and order.
    """

    def one(subset: Array, key: Array, shift: Array, scale: Array) -> Probe:
        start, shuffle = jax.random.split(key)
        layer = _linear(start, features.shape[1], classes)
        tx = optax.adamw(settings.learning_rate, weight_decay=settings.weight_decay)
        loop = _Loop(
            layer, tx.init(layer), layer, jnp.float32(-jnp.inf), jnp.int32(0), jnp.int32(0)
        )

        def going(loop: _Loop) -> Array:
            tired = loop.epoch - loop.best_epoch >= settings.patience
            return (loop.epoch < settings.epochs) & ~tired

        def epoch(loop: _Loop) -> _Loop:
            rows = _batches(jax.random.fold_in(shuffle, loop.epoch), subset, settings.batch_size)
            step = partial(_step, tx, settings.kind, features, labels, shift, scale)
            (layer, opt), _ = jax.lax.scan(step, (loop.layer, loop.opt), rows)
            seen = _apply(_fold(layer, shift, scale), valid_features)
            now = score(seen, valid_labels, settings.kind)
            better = now > loop.score  # false for NaN
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), layer, loop.best)
            count = loop.epoch + 1
            best_epoch = jnp.where(better, count, loop.best_epoch)
            return _Loop(layer, opt, best, jnp.where(better, now, loop.score), best_epoch, count)

        end = jax.lax.while_loop(going, epoch, loop)
        kernel, bias = _fold(end.best, shift, scale)
        return Probe(kernel, bias, end.score, end.best_epoch, end.epoch)

    # Seed by seed, because each gathers its records: under vmap that is s copies of the features.
    moments = jax.lax.map(partial(_moments, features, standardize=settings.standardize), subsets)
    with jax.default_matmul_precision("float32"):  # a TPU would multiply in bfloat16
        return jax.vmap(one)(subsets, keys, *moments)


def _linear(key: Key[Array, ""], inputs: int, outputs: int) -> tuple[Array, Array]:
    """torch.nn.Linear's initialization, as in the protocol's code: uniform within 1 / sqrt(f)."""
    bound = inputs**-0.5
    a, b = jax.random.split(key)
    kernel = jax.random.uniform(a, (inputs, outputs), minval=-bound, maxval=bound)
    return kernel, jax.random.uniform(b, (outputs,), minval=-bound, maxval=bound)


def _apply(layer: tuple[Array, Array], x: Float[Array, "b f"]) -> Float[Array, "b c"]:
    return x @ layer[0] + layer[1][None]


def _fold(layer: tuple[Array, Array], shift: Array, scale: Array) -> tuple[Array, Array]:
    """The layer on raw features that equals `layer` on (x - shift) * scale."""
    kernel = layer[0] * scale[:, None]
    return kernel, layer[1] - shift @ kernel


def _moments(features: Array, subset: Array, standardize: bool) -> tuple[Array, Array]:
    """shift and scale [f] of the features over the records of `subset` (0 and 1 if not asked)."""
    width = features.shape[1]
    if not standardize:
        return jnp.zeros(width), jnp.ones(width)
    present = (subset >= 0).astype(features.dtype)[:, None]
    chosen = features[jnp.maximum(subset, 0)]
    mean = (chosen * present).sum(0) / present.sum()
    var = (jnp.square(chosen - mean[None]) * present).sum(0) / present.sum()
    # What is constant here teaches nothing: 0, or its untrained weight would speak where it is not.
    varies = var > 1e-8 * jnp.square(mean)
    return mean, jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, var, 1)), 0)


def _batches(key: Key[Array, ""], subset: Int[Array, " k"], size: int) -> Int[Array, "t b"]:
    """The records of one epoch in a new order, in batches; -1 fills the end of the last one."""
    size = min(size, len(subset))
    steps = -(-len(subset) // size)
    rank = jax.random.uniform(key, subset.shape) + (subset < 0).astype(jnp.float32)
    order = subset[jnp.argsort(rank)]
    return jnp.pad(order, (0, steps * size - len(subset)), constant_values=-1).reshape(steps, size)


def _step(
    tx: optax.GradientTransformation,
    kind: Kind,
    features: Array,
    labels: Array,
    shift: Array,
    scale: Array,
    state: tuple[Any, Any],
    rows: Int[Array, " b"],
) -> tuple[tuple[Any, Any], None]:
    layer, opt = state
    at = jnp.maximum(rows, 0)
    x, y = (features[at] - shift[None]) * scale[None], labels[at]
    weight = (rows >= 0).astype(x.dtype)
    loss = classify.multilabel_loss if kind == "multilabel" else classify.multiclass_loss
    grads = jax.grad(lambda layer: loss(_apply(layer, x), y, weight))(layer)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with fp32
        updates, new_opt = tx.update(grads, opt, layer)
        new = optax.apply_updates(layer, updates)
    # A batch of padding only (seeds' subsets differ a little in length) must not move the layer.
    kept = jax.tree.map(lambda a, b: jnp.where(rows[0] >= 0, a, b), (new, new_opt), state)
    return kept, None
