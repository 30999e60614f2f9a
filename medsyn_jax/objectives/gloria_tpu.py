"""GLoRIA's local similarities on a TPU, with the arrays of a pair in the chip's fast memory.

XLA writes the regions x words arrays of `gloria` to memory between its products, dozens of times a
pair. These Pallas kernels read regions, their Gram matrices and words, and write two numbers a
word. The backward pass computes the arrays of a pair twice, for the gradient of the regions and for
that of the words: a quarter more arithmetic than a single pass, which would have to accumulate one
of the two gradients in memory.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

REPORTS = 8  # of a step of the grid: the rows of a tile
_VMEM = 14 * 2**20  # bytes; a v4 has 16 MiB


def fits(regions: int, words: int, width: int, itemsize: int) -> bool:
    """Whether the arrays of a step of the grid fit into the fast memory of any TPU."""
    r, w, d = (-(-n // 128) * 128 for n in (regions, words, width))
    read = itemsize * (r * d + r * r + REPORTS * w * d)
    written = 4 * max(2 * REPORTS * w * d, 3 * r * d + r * r)
    return 2 * read + written + 8 * 4 * r * w < _VMEM


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def products(
    regions: Float[Array, "i r d"],
    words: Float[Array, "j w d"],
    mask: Float[Array, "j w"],
    tau1: float,
    interpret: bool = False,
) -> tuple[Float[Array, "i j w"], Float[Array, "i j w"]]:
    """w . c_w and |c_w|^2 of every image, report and word, fp32, as in `gloria`.

    mask: 1 on real words, 0 elsewhere. j: a multiple of REPORTS.
    """
    inputs = _inputs(regions, words, mask)
    pairs = ("pair", (len(regions), *mask.shape), jnp.float32)
    kernel = partial(_forward, tau1=tau1)
    dot, quad = _call(kernel, True, inputs, (pairs, pairs), (), (1, 1), interpret)
    return dot, quad


def _saved(regions: Array, words: Array, mask: Array, tau1: float, interpret: bool) -> tuple:
    return products(regions, words, mask, tau1, interpret), (regions, words, mask)


def _backward(tau1: float, interpret: bool, saved: tuple, slopes: tuple[Array, Array]) -> tuple:
    regions, words, mask = saved
    inputs = (*_inputs(regions, words, mask), *(("pair", x) for x in slopes))
    r, d = regions.shape[1:]
    sums = pltpu.VMEM((r, d), jnp.float32), pltpu.VMEM((r, r), jnp.float32)
    of_regions = ("image", regions.shape, regions.dtype)
    of_words = ("report", words.shape, jnp.float32)
    (dv,) = _call(
        partial(_to_regions, tau1=tau1), True, inputs, (of_regions,), sums, (2, 2), interpret
    )
    (dt,) = _call(partial(_to_words, tau1=tau1), False, inputs, (of_words,), (), (2, 1), interpret)
    return dv, dt.astype(words.dtype), None


products.defvjp(_saved, _backward)


def _inputs(regions: Array, words: Array, mask: Array) -> tuple[tuple[str, Array], ...]:
    gram = _dot(regions, regions, 2, 2, batch=(0,)).astype(regions.dtype)
    return ("image", regions), ("image", gram), ("report", words), ("report", mask)


def _call(
    kernel: Callable,
    images_first: bool,
    inputs: Sequence[tuple[str, Array]],
    outputs: Sequence[tuple[str, tuple[int, ...], Any]],
    scratch: Sequence[Any],
    counts: tuple[int, int],
    interpret: bool,
) -> tuple[Array, ...]:
    """The kernel over all images and blocks of reports; images_first: images in the outer loop.

    inputs, outputs: each with the kind of its leading axis or axes: "image", "report" or both,
    "pair". counts: the numbers of products r w d and r r w of a pair.
    """
    (i, r, d), (j, w) = inputs[0][1].shape, inputs[3][1].shape
    lead = {"image": (1,), "report": (REPORTS,), "pair": (1, REPORTS)}

    def block(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*lead[kind], *shape[len(lead[kind]) :])

    def spec(kind: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        def at(a: Array, b: Array) -> tuple:
            image, report = (a, b) if images_first else (b, a)
            places = {"image": (image,), "report": (report,), "pair": (image, report)}[kind]
            return (*places, *[0] * (len(shape) - len(places)))

        return pl.BlockSpec(block(kind, shape), at)

    steps = i * (j // REPORTS)
    times = {"pair": steps, "image": i, "report": steps}
    times |= {} if images_first else {"image": steps, "report": j // REPORTS}
    moved = [(kind, x.shape, x.dtype) for kind, x in inputs] + list(outputs)
    size = sum(times[k] * math.prod(block(k, s)) * jnp.dtype(t).itemsize for k, s, t in moved)
    return pl.pallas_call(
        kernel,
        grid=(i, j // REPORTS) if images_first else (j // REPORTS, i),
        in_specs=[spec(kind, x.shape) for kind, x in inputs],
        out_specs=[spec(kind, shape) for kind, shape, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * i * j * r * w * (counts[0] * d + counts[1] * r),
            transcendentals=2 * i * j * r * w,
            bytes_accessed=size,
        ),
        interpret=interpret,
    )(*(x for _, x in inputs))


def _dot(x: Array, y: Array, of_x: int, of_y: int, batch: tuple[int, ...] = ()) -> Array:
    """Sum over axis of_x of x and axis of_y of y, in fp32; batch: axes of both."""
    return lax.dot_general(
        x,
        y,
        (((of_x,), (of_y,)), (batch, batch)),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _pair(v: Array, gram: Array, t: Array, mask: Array, tau1: float) -> tuple[Array, ...]:
    """s, a, b and G b [r, w] of one image and report, as in `gloria`; mask: [1, w]."""
    s = _dot(v, t, 1, 1)
    top = jnp.where(mask > 0, s, -1e30).max(1, keepdims=True)
    raised = jnp.where(mask > 0, jnp.exp(s - top), 0.0)
    a = raised / jnp.maximum(raised.sum(1, keepdims=True), 1e-30)
    weight = jnp.exp(tau1 * a - tau1 / 2)
    b = weight / weight.sum(0, keepdims=True)
    return s, a, b, _dot(gram, b.astype(v.dtype), 1, 0)


def _forward(v, gram, words, mask, dot, quad, *, tau1: float) -> None:
    @pl.loop(0, REPORTS)
    def _(n: Array) -> None:
        row = pl.ds(n, 1)
        s, _, b, gb = _pair(v[0], gram[0], words[n], mask[row, :], tau1)
        dot[0, row, :] = (b * s).sum(0, keepdims=True)
        quad[0, row, :] = (b * gb).sum(0, keepdims=True)


def _slopes(v, gram, words, mask, ddot, dquad, n: Array, tau1: float) -> tuple[Array, ...]:
    """Slopes along s, b, and dquad b of the n-th report of a step, in the type of v."""
    row = pl.ds(n, 1)
    s, a, b, gb = _pair(v[0], gram[0], words[n], mask[row, :], tau1)
    ddot, dquad = ddot[0, row, :], dquad[0, row, :]
    db = ddot * s + 2 * dquad * gb
    da = tau1 * b * (db - (b * db).sum(0, keepdims=True))
    ds = ddot * b + a * (da - (a * da).sum(1, keepdims=True))
    return tuple(x.astype(v.dtype) for x in (ds, b, dquad * b))


def _to_regions(v, gram, words, mask, ddot, dquad, dv, sum_v, sum_gram, *, tau1: float) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        sum_v[...] = jnp.zeros_like(sum_v)
        sum_gram[...] = jnp.zeros_like(sum_gram)

    @pl.loop(0, REPORTS)
    def _(n: Array) -> None:
        ds, b, turned = _slopes(v, gram, words, mask, ddot, dquad, n, tau1)
        sum_v[...] += _dot(ds, words[n], 1, 0)
        sum_gram[...] += _dot(turned, b, 1, 1)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        through = _dot((2 * sum_gram[...]).astype(v.dtype), v[0], 1, 0)
        dv[0] = (sum_v[...] + through).astype(dv.dtype)


def _to_words(v, gram, words, mask, ddot, dquad, dwords, *, tau1: float) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dwords[...] = jnp.zeros_like(dwords)

    @pl.loop(0, REPORTS)
    def _(n: Array) -> None:
        ds, _, _ = _slopes(v, gram, words, mask, ddot, dquad, n, tau1)
        dwords[n] += _dot(ds, v[0], 0, 0)
