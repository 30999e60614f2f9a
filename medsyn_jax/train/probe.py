"""The linear probe: one linear layer on frozen features, its labels, its fit and its figures.

All seeds are fitted in one jit: epochs, shuffling, validation and early stopping run on the device,
so a fit of 5,000 records and 50 epochs costs seconds rather than 5,000 dispatches a seed.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from medsyn_jax.core import checks, estimates, metrics
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.estimates import Figure
from medsyn_jax.objectives import classify

Kind = Literal["multilabel", "multiclass"]
RULES = (  # of tasks that compute features and fit probes to them
    checks.numbers("above 0", "probe", "learning_rate batch_size epochs patience"),
    checks.numbers("from 0", "probe", "weight_decay"),
    checks.numbers("above 0", "data", "batch_size"),
    checks.numbers("above 0", "", "seeds"),
    checks.numbers("from 0", "", "seed"),
    checks.numbers("from 0", "data", "threads"),
)


@dataclass(frozen=True)
class Task:
    """The labels of a data set that a probe learns, and how."""

    kind: Kind
    names: tuple[str, ...]
    columns: np.ndarray  # int [c]: places among the labels of the data set
    uncertain: np.ndarray  # int8 [c]: what -1 counts as in training and validation
    unmentioned: np.ndarray  # int8 [c]: what -2 counts as, everywhere

    def targets(self, labels: np.ndarray, test: bool = False) -> np.ndarray:
        """int8 [n, c] (1, 0, -2 left out), or int32 [n] classes (-2 left out), of int8 [n, l].

        In a test split "uncertain" is left out whatever the policy: nobody knows the answer.
        """
        uncertain = np.full_like(self.uncertain, classify.UNMENTIONED) if test else self.uncertain
        arrays = (labels[:, self.columns], uncertain, self.unmentioned)
        targets = np.asarray(classify.apply_policy(*map(jnp.asarray, arrays)))
        if self.kind == "multilabel":
            return targets
        positive = targets == 1
        classes = np.where(positive.sum(axis=1) == 1, positive.argmax(axis=1), classify.UNMENTIONED)
        return classes.astype(np.int32)

    def columns_of(self, targets: np.ndarray) -> np.ndarray:
        """Targets as labels [n, c]; a class is 1 in its own column and 0 in the others."""
        if targets.ndim == 2:
            return targets
        columns = (targets[:, None] == np.arange(len(self.names))).astype(np.int8)
        return np.where(targets[:, None] >= 0, columns, np.int8(classify.UNMENTIONED))

    def without(self, targets: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Targets with the entries (or the records) of `labels`, bool [c], marked as left out."""
        left_out = labels[None] if targets.ndim == 2 else labels[np.maximum(targets, 0)]
        return np.where(left_out, targets.dtype.type(classify.UNMENTIONED), targets)


def has_both(y: np.ndarray) -> np.ndarray:
    """bool [c]: which labels have a positive and a negative in y [n, c]."""
    return (y == 1).any(axis=0) & (y == 0).any(axis=0)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["learning_rate", "weight_decay", "epochs", "patience"],
    meta_fields=["kind", "batch_size", "standardize"],  # a change of these compiles anew
)
@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is fitted: AdamW with b1 0.9, b2 0.999 and a constant learning rate.

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
    """Fitted layers of s seeds, for raw features, at the best epoch, and the course of the fits."""

    kernel: Float[Array, "s f c"]
    bias: Float[Array, "s c"]
    score: Float[Array, " s"]  # best validation score; -inf if no epoch gave a finite one
    best_epoch: Int[Array, " s"]  # from 1
    epochs: Int[Array, " s"]  # epochs run


class _Loop(NamedTuple):
    layer: Any
    opt: Any
    best: Any
    score: Array
    best_epoch: Array
    epoch: Array


def score(logits: Float[Array, "n c"], labels: Shaped[Array, "n ..."], kind: Kind) -> Array:
    """The score that early stopping maximizes: mean AUROC over the labels (or of the second of two
    classes), accuracy for three classes and more. NaN where it is undefined."""
    if kind == "multilabel":
        return classify.mean_auroc(logits, labels)
    if logits.shape[1] == 2:
        return classify.mean_auroc(logits[:, 1:] - logits[:, :1], labels[:, None])
    return classify.mean_accuracy(logits, labels)


def logits(probe: Any, features: Float[Array, "n f"]) -> Float[Array, "s n c"]:
    """Logits of every seed's layer. probe: has kernel [s, f, c] and bias [s, c]."""
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
            stalled = loop.epoch - loop.best_epoch >= settings.patience
            return (loop.epoch < settings.epochs) & ~stalled

        def epoch(loop: _Loop) -> _Loop:
            rows = _batches(jax.random.fold_in(shuffle, loop.epoch), subset, settings.batch_size)
            step = partial(_step, tx, settings.kind, features, labels, shift, scale)
            (layer, opt), _ = jax.lax.scan(step, (loop.layer, loop.opt), rows)
            valid_logits = _apply(_fold(layer, shift, scale), valid_features)
            new = score(valid_logits, valid_labels, settings.kind)
            better, count = new > loop.score, loop.epoch + 1  # NaN is never better
            kept = (loop.best, loop.score, loop.best_epoch)
            kept = jax.tree.map(partial(jnp.where, better), (layer, new, count), kept)
            return _Loop(layer, opt, kept[0], kept[1], kept[2], count)

        end = jax.lax.while_loop(going, epoch, loop)
        kernel, bias = _fold(end.best, shift, scale)
        return Probe(kernel, bias, end.score, end.best_epoch, end.epoch)

    # Seed by seed, because each gathers its records: vmap would make s copies of the features.
    scales = jax.lax.map(partial(moments, features, standardize=settings.standardize), subsets)
    with jax.default_matmul_precision("float32"):  # a TPU would multiply in bfloat16
        return jax.vmap(one)(subsets, keys, *scales)


def fit_seeds(
    task: Task,
    train: tuple[Any, Any],
    valid: tuple[Any, Any],
    subsets: np.ndarray,
    *,
    seed: int,
    settings: Any,
    where: str = "",
) -> Probe:
    """Fit a probe to each row of `subsets` by `fit`, with a key of its own from `seed`.

    train, valid: (features, targets); settings: the fields of `ProbeSettings` but `kind`. Raises
    UserError if a fit diverges; `where` then says which.
    """
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(subsets))]
    arrays = map(jnp.asarray, (*train, subsets, *valid))
    how = ProbeSettings(kind=task.kind, **settings)
    fitted = fit(*arrays, jnp.stack(keys), classes=len(task.names), settings=how)
    if not np.isfinite(np.asarray(fitted.score)).all():
        raise UserError(
            f"config.probe.learning_rate: {how.learning_rate}: the fit{where} diverged: use a "
            "smaller one"
        )
    return fitted


def judge(
    task: Task,
    outputs: np.ndarray,
    test: np.ndarray,
    subjects: np.ndarray,
    trained: np.ndarray | None = None,
    valid: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Figure]:
    """AUROC of each label and their mean, accuracy of classes; with `valid`, further figures.

    Classes are judged one against the rest, of two classes the second alone. The further figures
    are those of `metrics.label_figures`, at the threshold of the highest F1 in validation.

    outputs: logits [s, n, c]; test: targets [n, c] or classes [n]; trained: bool [c], the labels
    that the probe was taught (default all); valid: outputs and targets of the validation split. A
    label with one class only in the test split has no AUROC. Labels that were not taught, and
    records of such a class, are left out.
    """
    figures = {}
    trained = np.ones(len(task.names), bool) if trained is None else trained
    test = task.without(test, ~trained)
    if test.ndim == 1:
        predicted = np.where(trained, outputs, -np.inf).argmax(axis=-1)

        def accuracies(w: np.ndarray) -> np.ndarray:
            return np.stack([metrics.accuracy(p, test, w) for p in predicted], axis=1)

        figures["accuracy"] = estimates.figure(accuracies, test >= 0, subjects)
    scores, labels = columns(task, outputs, test, trained), task.columns_of(test)
    chosen = judged(task, test)
    thresholds = None
    if valid is not None:
        known = task.columns_of(task.without(valid[1], ~trained))
        of = columns(task, valid[0], valid[1], trained)
        each = [[metrics.best_threshold(x[:, i], known[:, i]) for i in chosen] for x in of]
        thresholds = np.array(each).reshape(len(of), len(chosen))
    names = [task.names[i] for i in chosen]
    settings = (scores[..., chosen], labels[:, chosen], names, subjects, thresholds)
    return figures | metrics.label_figures(*settings)


def judged(task: Task, test: np.ndarray) -> np.ndarray:
    """The places of the labels with both classes; of two classes the second tells all."""
    judged = has_both(task.columns_of(test))
    if test.ndim == 1 and len(task.names) == 2:
        judged[0] = False
    return np.flatnonzero(judged)


def columns(task: Task, outputs: np.ndarray, y: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Log-odds [s, n, c] of each label, or of each class against the other classes taught."""
    if y.ndim == 2:
        return outputs
    outputs = np.where(trained, outputs, -np.inf)
    others = (np.delete(outputs, i, axis=-1) for i in range(len(task.names)))
    rest = np.stack([np.logaddexp.reduce(x, axis=-1) for x in others], axis=-1)
    return np.where(trained, outputs - np.where(trained, rest, 0), -1e9)


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


def moments(features: Array, subset: Array, standardize: bool) -> tuple[Array, Array]:
    """shift and scale [f] of the features over the records of `subset` (else 0 and 1)."""
    width = features.shape[1]
    if not standardize:
        return jnp.zeros(width), jnp.ones(width)
    present = (subset >= 0).astype(features.dtype)[:, None]
    chosen = features[jnp.maximum(subset, 0)]
    mean = (chosen * present).sum(0) / present.sum()
    var = (jnp.square(chosen - mean[None]) * present).sum(0) / present.sum()
    # A constant feature teaches nothing: scale 0, or its untrained weight would act elsewhere.
    varies = var > 1e-8 * jnp.square(mean)
    return mean, jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, var, 1)), 0)


def _batches(key: Key[Array, ""], subset: Int[Array, " k"], size: int) -> Int[Array, "t b"]:
    """The records of one epoch in a new order, in batches; -1 pads the last one."""
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
    loss = classify.LOSSES[kind]
    grads = jax.grad(lambda layer: loss(_apply(layer, x), y, weight))(layer)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with fp32
        updates, new_opt = tx.update(grads, opt, layer)
        new = optax.apply_updates(layer, updates)
    # A batch of padding alone (subsets differ a little in length) must not change the layer.
    kept = jax.tree.map(lambda a, b: jnp.where(rows[0] >= 0, a, b), (new, new_opt), state)
    return kept, None
