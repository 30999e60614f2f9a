"""The convex linear probe: L2-regularised logistic regression, solved to convergence.

The objective is scikit-learn's: 1/2 |w|^2 + C sum_i loss_i(w x_i + b), with a free intercept b. It
is strictly convex in w, so that neither a start nor an order of the records has a say in its
minimum. The solver is Newton's method; each step solves its linear system by conjugate gradients.
They are preconditioned with the eigenvalues of the features' Gram matrix: in its eigenvectors, the
second derivatives of a logistic loss are nearly diagonal. With fewer records than features, all of
this happens in the space that the records span.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from medsyn_jax.core.errors import UserError
from medsyn_jax.train import probe

_TOLERANCE = 3e-6  # of a Newton step, relative to the weights; the error after the step is smaller
_NEWTON_STEPS, _CG_STEPS, _HALVINGS = 50, 100, 20  # limits that a solvable problem does not reach
_RESIDUAL = 0.1  # of a linear system, relative: more would be wasted far from the minimum


class Fit(NamedTuple):
    """Layers of s subsets for raw features; where all labels share C, its columns are equal."""

    kernel: Float[Array, "s f c"]
    bias: Float[Array, "s c"]
    loss: Float[Array, "s c"]  # mean cross-entropy of the validation records, in nats
    inverse_penalty: Float[Array, "s c"]  # C


@dataclass(frozen=True)
class Problem:
    """What the logits of n records are to explain: c labels, or one of c classes.

    known: 1 or 0, [n, c] for labels, [n, 1] for classes; target: 1 or 0, [n, c].
    """

    kind: probe.Kind
    known: Float[Array, "n _"]
    target: Float[Array, "n c"]
    usable: Shaped[Array, " c"]  # bool; a class that is not has probability 0

    def losses(self, logits: Float[Array, "n c"]) -> Float[Array, "n _"]:
        """Cross-entropy in nats, 0 where it is unknown; [n, c] for labels, [n, 1] for classes."""
        if self.kind == "multilabel":
            return (jax.nn.softplus(logits) - self.target * logits) * self.known
        total = jax.nn.logsumexp(self._inside(logits), axis=1, keepdims=True)
        return (total - (self.target * logits).sum(1, keepdims=True)) * self.known

    def probabilities(self, logits: Float[Array, "n c"]) -> Float[Array, "n c"]:
        """Of each label, or of each class."""
        if self.kind == "multilabel":
            return jax.nn.sigmoid(logits)
        return jax.nn.softmax(self._inside(logits), axis=1)

    def curved(self, p: Float[Array, "n c"], moves: Float[Array, "n c"]) -> Float[Array, "n c"]:
        """The second derivatives of the losses at probabilities p, times moves of the logits."""
        if self.kind == "multiclass":
            moves = moves - (p * moves).sum(1, keepdims=True)
            return self.known * p * moves
        return self.known * p * (1 - p) * moves

    def _inside(self, logits: Array) -> Array:
        return jnp.where(self.usable[None], logits, -1e9)


def _problem(kind: probe.Kind, labels: Array, here: Array, classes: int) -> Problem:
    """here: bool [n], the records that count."""
    usable = jnp.ones(classes, bool)
    if kind == "multilabel":
        known, target = (labels >= 0) & here[:, None], labels == 1
    else:
        known = ((labels >= 0) & here)[:, None]
        target = labels[:, None] == jnp.arange(classes)[None]
    return Problem(kind, known.astype(jnp.float32), target.astype(jnp.float32), usable)


def fit_seeds(
    task: probe.Task,
    train: tuple[Any, Any],
    valid: tuple[Any, Any],
    subsets: Sequence[np.ndarray],
    *,
    inverse_penalties: Sequence[float],
    where: str = "",
) -> list[Fit]:
    """`fit` of each row of each array of `subsets`, int [s, k] padded with -1.

    train, valid: (features, targets). Equal rows, such as those of all seeds at 100 %, are fitted
    once. Raises UserError if a fit is not finite; `where` then says which.
    """
    distinct = [np.unique(np.sort(rows, axis=1), axis=0, return_inverse=True) for rows in subsets]
    fits = fit(
        *map(jnp.asarray, train),
        tuple(jnp.asarray(rows) for rows, _ in distinct),
        *map(jnp.asarray, valid),
        jnp.sort(jnp.asarray(inverse_penalties, jnp.float32)),
        kind=task.kind,
        classes=len(task.names),
    )
    if not all(np.isfinite(x.kernel).all() and np.isfinite(x.loss).all() for x in fits):
        raise UserError(
            f"config.encoder: the logistic regression{where} is not finite: the features hold NaN "
            "or infinity, or numbers too large for fp32: check the weights of the encoder"
        )
    places = [inverse.reshape(-1) for _, inverse in distinct]
    return [Fit(*(x[i] for x in fitted)) for fitted, i in zip(fits, places, strict=True)]


@partial(jax.jit, static_argnames=("kind", "classes"))
def fit(
    features: Float[Array, "n f"],
    labels: Shaped[Array, "n ..."],
    subsets: tuple[Int[Array, "_ _"], ...],
    valid_features: Float[Array, "m f"],
    valid_labels: Shaped[Array, "m ..."],
    inverse_penalties: Float[Array, " p"],
    *,
    kind: probe.Kind,
    classes: int,
) -> tuple[Fit, ...]:
    """Solve all penalties, labels, subsets and label fractions in one program.

    labels: int8 [n, c] (1, 0, negative = left out) for "multilabel", each label a regression by
    itself; int32 [n] (0 ... c - 1, negative = left out) for "multiclass", one regression of c
    classes. subsets: for each fraction, rows [s, k] of `features`, padded with -1. Features are
    scaled to mean 0 and variance 1 over the rows of a subset. inverse_penalties: C, the smallest
    first; the one with the lowest loss on the validation records is kept, for each label by itself.
    A larger C, which takes longer, is not tried when no label gained by the last one.

    A label without both classes in a subset gets a layer of zeros. A class without a record in a
    subset is left out of its regression and of the choice of C.
    """

    def one(subset: Array) -> Fit:
        rows, here = jnp.maximum(subset, 0), subset >= 0
        shift, scale = probe.moments(features, subset, standardize=True)
        x = (features[rows] - shift[None]) * scale[None] * here[:, None].astype(features.dtype)
        problem = _problem(kind, labels[rows], here, classes)
        positives, count = (problem.known * problem.target).sum(0), problem.known.sum(0)
        if kind == "multilabel":
            taught = ((positives > 0) & (positives < count)).astype(jnp.float32)
            problem = replace(problem, known=problem.known * taught[None])
        else:
            problem = replace(problem, usable=positives > 0)
        basis, z, spectrum = _rotated(x)
        z = jnp.concatenate([z, here[:, None].astype(z.dtype)], axis=1)  # the intercept comes last
        spectrum = jnp.append(spectrum, here.sum().astype(z.dtype))
        judge = _problem(kind, valid_labels, jnp.ones(len(valid_labels), bool), classes)
        if kind == "multiclass":  # a class that was not taught cannot tell penalties apart
            taught = judge.target @ problem.usable.astype(jnp.float32)
            judge = replace(judge, known=judge.known * taught[:, None], usable=problem.usable)
        count = jnp.maximum(judge.known.sum(0), 1)

        def going(state: tuple[Array, Array, Fit]) -> Array:
            i, _, best = state
            gained = (best.inverse_penalty == inverse_penalties[i - 1]).any()
            return (i < len(inverse_penalties)) & ((i == 0) | gained)

        def next_penalty(state: tuple[Array, Array, Fit]) -> tuple[Array, Array, Fit]:
            i, weights, best = state
            c = inverse_penalties[i]
            penalty = jnp.full(z.shape[1], 1 / c).at[-1].set(0)
            weights = solve(z, spectrum, problem, penalty, weights)
            kernel = scale[:, None] * (basis @ weights[:-1])
            bias = weights[-1] - shift @ kernel
            loss = judge.losses(valid_features @ kernel + bias[None]).sum(0) / count
            loss = jnp.broadcast_to(loss, bias.shape)
            better = ~(loss >= best.loss)  # NaN is kept, to be reported
            new = Fit(kernel, bias, loss, jnp.full_like(bias, c))
            return i + 1, weights, jax.tree.map(partial(jnp.where, better), new, best)

        nothing = jnp.zeros(classes)
        empty = Fit(jnp.zeros((len(shift), classes)), nothing, nothing + jnp.inf, nothing)
        start = jnp.zeros((z.shape[1], classes))
        return jax.lax.while_loop(going, next_penalty, (jnp.int32(0), start, empty))[2]

    with jax.default_matmul_precision("float32"):  # a TPU would multiply in bfloat16
        return tuple(jax.lax.map(one, rows) for rows in subsets)


def solve(
    z: Float[Array, "n r"],
    spectrum: Float[Array, " r"],
    problem: Problem,
    penalty: Float[Array, " r"],
    start: Float[Array, "r c"],
) -> Float[Array, "r c"]:
    """Weights that minimise sum losses(z w) + 1/2 sum penalty w^2, from any `start`.

    z: coordinates of the records in which the matrix z' z has about the diagonal `spectrum`. Labels
    are separate problems, solved side by side; classes are one.
    """
    axes = 0 if problem.kind == "multilabel" else (0, 1)
    # A stored transpose: XLA:CPU takes three times as long for a product over the rows of z.
    transposed, penalty = jax.lax.optimization_barrier(z.T), penalty[:, None]

    def dot(a: Array, b: Array) -> Array:
        return (a * b).sum(axes, keepdims=True)  # [1, c] of labels, [1, 1] of classes

    def newton(state: tuple[Array, ...]) -> tuple[Array, ...]:
        weights, logits, _, count = state
        p = problem.probabilities(logits)
        slope = transposed @ ((p - problem.target) * problem.known) + penalty * weights
        variance = (problem.known * p * (1 - p)).sum(0) / z.shape[0]
        inverse = 1 / (spectrum[:, None] * variance[None] + penalty + 1e-12)
        step, moves = _conjugate_gradients(z, transposed, problem, p, penalty, slope, inverse, dot)

        before, descent = problem.losses(logits), dot(slope, step)
        slack = 1e-6 * before.sum(0, keepdims=True)  # rounding of the sum

        def shorter(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            size, far, count = state
            size = jnp.where(far, size / 2, size)
            change = (problem.losses(logits + size * moves) - before).sum(0, keepdims=True)
            change = change + dot(penalty * step, size * (weights + size / 2 * step))
            return size, change > 1e-4 * size * descent + slack, count + 1

        def too_far(state: tuple[Array, Array, Array]) -> Array:
            return state[1].any() & (state[2] < _HALVINGS)

        twice = (jnp.full_like(descent, 2.0), jnp.ones_like(descent, bool), jnp.int32(0))
        size, *_ = jax.lax.while_loop(too_far, shorter, twice)
        step, weights = size * step, weights + size * step
        moving = dot(step, step) > _TOLERANCE**2 * dot(weights, weights)
        return weights, z @ weights, moving.any(), count + 1

    def unfinished(state: tuple[Array, ...]) -> Array:
        return state[2] & (state[3] < _NEWTON_STEPS)

    state = (start, z @ start, jnp.bool_(True), jnp.int32(0))
    weights = jax.lax.while_loop(unfinished, newton, state)[0]
    if problem.kind == "multilabel":
        return weights
    # The same number added to all intercepts of classes changes no loss: their mean is set to 0.
    return weights.at[-1].add(-weights[-1].mean())


def _conjugate_gradients(
    z: Array,
    transposed: Array,
    problem: Problem,
    p: Array,
    penalty: Array,
    slope: Array,
    inverse: Array,
    dot: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
    """The Newton step [r, c] at probabilities p, and the moves of the logits [n, c].

    slope: of the objective; inverse: preconditioner [r, c]; dot: inner product in each problem.
    """
    first = -inverse * slope
    start = dot(-slope, first)
    goal = _RESIDUAL**2 * start

    def unsolved(state: tuple[Array, ...]) -> Array:
        *_, rest, count = state
        return (rest > goal).any() & (count < _CG_STEPS)

    def conjugate(state: tuple[Array, ...]) -> tuple[Array, ...]:
        step, moves, left, direction, rest, count = state
        along = z @ direction
        image = transposed @ problem.curved(p, along) + penalty * direction
        bend = dot(direction, image)
        going = (rest > goal) & (bend > 0)  # a problem that is solved waits for the others
        size = jnp.where(going, rest / jnp.where(going, bend, 1), 0)
        step, moves, left = step + size * direction, moves + size * along, left - size * image
        new = jnp.where(going, dot(left, inverse * left), 0)
        ratio = jnp.where(going, new / jnp.where(going, rest, 1), 0)
        return step, moves, left, inverse * left + ratio * direction, new, count + 1

    nothing = (jnp.zeros_like(slope), jnp.zeros_like(p))
    state = (*nothing, -slope, first, start, jnp.int32(0))
    step, moves, *_ = jax.lax.while_loop(unsolved, conjugate, state)
    return step, moves


def _rotated(x: Float[Array, "k f"]) -> tuple[Array, Array, Array]:
    """Orthonormal basis [f, r], r = min(k, f), of a space that holds the rows of x; the rows in
    this basis [k, r]; the eigenvalues [r] of their Gram matrix, which is diagonal there."""
    basis = jnp.linalg.qr(x.T)[0] if x.shape[0] < x.shape[1] else None
    z = x if basis is None else x @ basis
    spectrum, vectors = jnp.linalg.eigh(z.T @ z)
    basis = vectors if basis is None else basis @ vectors
    return basis, z @ vectors, jnp.maximum(spectrum, 0)
