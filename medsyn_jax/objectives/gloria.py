"""GLoRIA's global and local contrastive objectives (Huang et al., ICCV 2021), on global arrays.

For image i with regions v_r and report j with words w:

    s_rw = v_r . w
    a    = softmax of s over the words (real ones only)
    b    = softmax of tau1 a over the regions
    c_w  = sum_r b_rw v_r
    S_ij = log sum_w exp(tau2 cos(w, c_w))

Neither side is normalized, as in the official code. c_w is never formed: w . c_w = sum_r b_rw s_rw,
and |c_w|^2 = b_w' G b_w with G = V V' of the image, which takes fewer FLOPs if an image has fewer
regions than a region has dimensions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from medsyn_jax.core import pallas
from medsyn_jax.objectives import gloria_tpu
from medsyn_jax.objectives.contrastive import check_positive, contrastive_loss, directions

_EPS = 1e-16  # of the squared norms' product, as in torch's cosine similarity
TAU1_MOST = 150  # half of it is an exponent in fp32
_ARRAYS = 6  # of images x regions x reports x words that a block holds at a time


def local_similarity(
    regions: Float[Array, "i r d"],
    words: Float[Array, "j w d"],
    word_mask: Bool[Array, "j w"],
    *,
    tau1: float = 4.0,
    tau2: float = 5.0,
    memory_mib: int = 512,
    mesh: Mesh | None = None,
) -> Float[Array, "i j"]:
    """S of every image with every report, fp32, before tau3.

    word_mask: True on real words. A report without any has S = 0 and no gradient.
    mesh: over all of whose devices images and reports are sharded. Each device keeps its own images
    and visits all reports: their words are gathered once, the words' gradient is scattered once. On
    TPUs the kernels of `gloria_tpu` compute the pairs if they agree there with XLA's own operations
    (`core.pallas`).
    memory_mib: memory of a block of pairs elsewhere; a block has at least one report. No more of
    the i x r x j x w numbers exist at a time, neither in the forward pass nor in the backward pass,
    which computes them anew. On CPU a block is one image and as many reports as fit: products of
    plain matrices. On accelerators it is all images of the device.
    Raises ValueError for a tau that is not above 0, a tau1 above TAU1_MOST, and images or reports
    that the devices do not divide.
    """
    check_positive(tau1=tau1, tau2=tau2)
    if tau1 > TAU1_MOST:
        raise ValueError(f"tau1: {tau1}: give a number up to {TAU1_MOST}")
    devices = 1 if mesh is None else mesh.size
    if len(regions) % devices or len(words) % devices:
        raise ValueError(
            f"{len(regions)} images and {len(words)} reports do not divide over {devices} devices"
        )

    taus = {"tau1": float(tau1), "tau2": float(tau2)}
    in_blocks = partial(_in_blocks, **taus, memory_mib=memory_mib)
    by_image, by_report = (partial(in_blocks, by_image=x) for x in (True, False))
    tpu, kernels = by_report, partial(_in_kernels, **taus)
    # XLA can cut blocks of a sharded array by itself, but no kernel.
    if mesh is not None and _kernels_trusted(kernels, by_report, regions, words, mesh):
        tpu = kernels
    here = partial(lax.platform_dependent, cpu=by_image, tpu=tpu, default=by_report)
    if mesh is None or mesh.size == 1:
        return here(regions, words, word_mask)
    axes = mesh.axis_names

    def with_all(own: Array, words: Array, mask: Array) -> Array:
        return here(own, *(lax.all_gather(x, axes, tiled=True) for x in (words, mask)))

    rows = P(axes)
    mapped = jax.shard_map(
        with_all, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False
    )
    return mapped(regions, words, word_mask)


def local_loss(
    regions: Float[Array, "b r d"],
    words: Float[Array, "b w d"],
    word_mask: Bool[Array, "b w"],
    *,
    tau3: float = 10.0,
    **settings: Any,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of the cross-entropies of tau3 S against the diagonal, both ways; (loss, metrics).

    settings: of `local_similarity`. Raises ValueError as it does, and for a tau3 not above 0.
    """
    check_positive(tau3=tau3)
    metrics = directions(tau3 * local_similarity(regions, words, word_mask, **settings))
    return metrics["image_to_text"] + metrics["text_to_image"], metrics


def global_loss(
    image: Float[Array, "b d"], text: Float[Array, "b d"], *, tau3: float = 10.0
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of the cross-entropies of tau3 cos against the diagonal, both ways; (loss, metrics)."""
    check_positive(tau3=tau3)
    return contrastive_loss(image, text, temperature=1 / tau3)


def _in_blocks(
    regions: Array,
    words: Array,
    mask: Array,
    *,
    by_image: bool,
    tau1: float,
    tau2: float,
    memory_mib: int,
) -> Array:
    images, reports = 1 if by_image else len(regions), len(words)
    one = _ARRAYS * 4 * images * regions.shape[1] * words.shape[1]  # bytes of a report's pairs
    blocks = -(-reports // max(memory_mib * 2**20 // one, 1))
    size = -(-reports // blocks)  # so that blocks are alike
    cut = _Cut(by_image, size, tau1, tau2)
    return jnp.asarray(_similarity(regions, *_padded(size, words, mask), cut))[:, :reports]


def _kernels_trusted(
    kernels: Callable[..., Array], blocks: Callable[..., Array], v: Array, t: Array, mesh: Mesh
) -> bool:
    """Whether a TPU has room for the kernels at the sizes of regions v and words t, and agrees with
    XLA's blocks, for reports of no word up to all words."""
    (_, r, d), w, count = v.shape, t.shape[1], gloria_tpu.REPORTS
    if not gloria_tpu.fits(r, w, d, v.dtype.itemsize):
        return False
    mask = np.arange(w)[None] < np.linspace(0, w, count, dtype=int)[:, None]
    return pallas.trusted(
        "local loss",
        lambda v, t: kernels(v, t, jnp.asarray(mask)),
        lambda v, t: blocks(v, t, jnp.asarray(mask)),
        ((2, r, d), (count, w, d)),
        v.dtype,
        scale=d**-0.25,
        together=mesh.is_multi_process,
    )


def _in_kernels(regions: Array, words: Array, mask: Array, *, tau1: float, tau2: float) -> Array:
    reports = len(words)
    words, mask = _padded(gloria_tpu.REPORTS, words, mask)
    products = gloria_tpu.products(regions, words, mask.astype(jnp.float32), tau1)
    dot, quad = cast("tuple[Array, Array]", products)
    norm = jnp.square(words.astype(jnp.float32)).sum(-1)

    def of_one(dot: Array, quad: Array) -> Array:
        return _scores(tau2, _cosine(dot, quad, norm), mask)[0]

    return jax.vmap(of_one)(dot, quad)[:, :reports]


def _padded(size: int, words: Array, mask: Array) -> tuple[Array, Array]:
    """Words and mask with empty reports added, so that blocks of `size` divide them."""
    more = (0, -len(words) % size)
    return jnp.pad(words, (more, (0, 0), (0, 0))), jnp.pad(mask, (more, (0, 0)))


class _Cut(NamedTuple):
    """The static arguments: how images and reports are cut into blocks, and the temperatures.

    by_image: one image after the other, so that no array has an axis of images: XLA on CPU reduces
    [1, r, n, w] over r sixteen times slower than [r, n, w].
    """

    by_image: bool
    reports: int  # of a block
    tau1: float
    tau2: float


class _Block(NamedTuple):
    """Intermediate arrays of an image and n reports, fp32."""

    a: Float[Array, "r n w"]
    b: Float[Array, "r n w"]
    s: Float[Array, "r n w"]
    gb: Float[Array, "r n w"]  # G b
    norm: Float[Array, "n w"]  # |w|^2
    quad: Float[Array, "n w"]  # |c_w|^2
    cos: Float[Array, "n w"]


def _product(form: str, *factors: Array) -> Array:
    """Of factors in their own type, summed in fp32; an accelerator may not use fewer bits."""
    exact = lax.Precision.HIGHEST
    return jnp.einsum(form, *factors, precision=exact, preferred_element_type=jnp.float32)


def _block(tau1: float, v: Array, gram: Array, words: Array, mask: Array) -> _Block:
    """v: regions [r, d] of one image; gram: [r, r]; words: [n, w, d]; mask: [n, w]."""
    s = _product("rd,nwd->rnw", v, words)
    real = mask[None]
    top = lax.stop_gradient(jnp.where(real, s, -1e30).max(-1, keepdims=True))
    raised = jnp.where(real, jnp.exp(s - top), 0)
    a = raised / jnp.maximum(raised.sum(-1, keepdims=True), 1e-30)
    # tau1 a is between 0 and tau1: half of it keeps exp in range without a maximum.
    weight = jnp.exp(tau1 * a - tau1 / 2)
    b = weight / weight.sum(0)[None]
    gb = _product("rq,qnw->rnw", gram, b.astype(v.dtype))
    norm = jnp.square(words.astype(jnp.float32)).sum(-1)
    quad = (b * gb).sum(0)
    return _Block(a, b, s, gb, norm, quad, _cosine((b * s).sum(0), quad, norm))


def _cosine(dot: Array, quad: Array, norm: Array) -> Array:
    """Clipped: in bf16, rounding may give values above 1 if c_w is short beside its regions."""
    return jnp.clip(dot * lax.rsqrt(jnp.maximum(quad * norm, _EPS)), -1, 1)


def _scores(tau2: float, cos: Array, mask: Array) -> tuple[Array, Array]:
    """(S [n], softmax of tau2 cos over the real words [n, w]) of one image."""
    x = jnp.where(mask, tau2 * cos, -1e30)
    score = jnp.where(mask.any(-1), jax.nn.logsumexp(x, -1), 0)
    return score, jnp.exp(x - score[:, None])


def _blocks(cut: _Cut, *arrays: Array) -> tuple[Array, ...]:
    return tuple(x.reshape(-1, cut.reports, *x.shape[1:]) for x in arrays)


def _gram(v: Array) -> Array:
    return _product("...rd,...qd->...rq", v, v).astype(v.dtype)


def _block_scores(cut: _Cut, v: Array, gram: Array, words: Array, mask: Array) -> Array:
    """S of one image [r, d] or of all [i, r, d] with a block of n reports: [n] or [i, n]."""

    def of_one(v: Array, gram: Array) -> Array:
        return _scores(cut.tau2, _block(cut.tau1, v, gram, words, mask).cos, mask)[0]

    return of_one(v, gram) if v.ndim == 2 else jax.vmap(of_one)(v, gram)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _similarity(regions: Array, words: Array, mask: Array, cut: _Cut) -> Array:
    reports = _blocks(cut, words, mask)

    def scores(v: Array) -> Array:
        gram = _gram(v)
        return lax.map(lambda block: _block_scores(cut, v, gram, *block), reports)

    if cut.by_image:
        return lax.map(lambda v: scores(v).reshape(-1), regions)
    return jnp.moveaxis(scores(regions), 0, 1).reshape(len(regions), -1)


class _Slopes(NamedTuple):
    """Factors of the gradients of an image and n reports."""

    s: Float[Array, "r n w"]
    b: Float[Array, "r n w"]
    turned: Float[Array, "r n w"]  # b times the slope along |c_w|^2
    norm: Float[Array, "n w"]  # twice the slope along |w|^2


def _slopes(cut: _Cut, v: Array, gram: Array, words: Array, mask: Array, slope: Array) -> _Slopes:
    """slope: [n] along S. S does not depend on the length of c_w, so the sum over r of b times its
    gradient is zero, and one product differentiates the softmax over regions."""
    block = _block(cut.tau1, v, gram, words, mask)
    _, share = _scores(cut.tau2, block.cos, mask)
    dcos = jnp.where(jnp.abs(block.cos) < 1, cut.tau2 * slope[:, None] * share, 0)
    length = jnp.maximum(block.quad * block.norm, _EPS)
    ddot = (dcos * lax.rsqrt(length))[None]
    turn = dcos * block.cos / length  # minus twice the slope along |w|^2 |c_w|^2
    dquad = (-turn * block.norm)[None]
    da = cut.tau1 * block.b * (ddot * block.s + dquad * block.gb)
    dlogit = block.a * (da - (block.a * da).sum(-1, keepdims=True))
    return _Slopes(
        (ddot * block.b + dlogit).astype(v.dtype),
        block.b.astype(v.dtype),
        (dquad * block.b).astype(v.dtype),
        -turn * block.quad,
    )


def _block_gradients(
    cut: _Cut, v: Array, gram: Array, sums: tuple[Array, Array], block: tuple
) -> tuple[tuple[Array, Array], Array]:
    """Adds the share of a block of n reports to the gradients of v, of gram and of the words.

    v: as in `_block_scores`; block: words, mask, ds [n] or [i, n], dwords.
    """
    dv, dgram = sums
    words, mask, ds, dwords = block
    alone, slopes = v.ndim == 2, partial(_slopes, cut)
    slopes = slopes if alone else jax.vmap(slopes, (0, 0, None, None, 0))
    slope = slopes(v, gram, words, mask, ds)
    dv += _product("...rnw,nwd->...rd", slope.s, words)
    dgram += _product("...rnw,...qnw->...rq", slope.turned, slope.b)
    more = _product("rnw,rd->nwd" if alone else "mrnw,mrd->nwd", slope.s, v)
    norm = slope.norm if alone else slope.norm.sum(0)
    return (dv, dgram), dwords + more + norm[..., None] * words.astype(jnp.float32)


def _backward(cut: _Cut, saved: tuple[Array, Array, Array], ds: Array) -> tuple:
    regions, words, mask = saved
    reports = _blocks(cut, words, mask)

    def some(dwords: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        """Adds to dwords and returns dv, of one image [r, d] or of all [i, r, d]."""
        v, ds = xs
        gram = _gram(v)
        zeros = jnp.zeros(v.shape, jnp.float32), jnp.zeros(gram.shape, jnp.float32)
        ds = jnp.moveaxis(ds.reshape(*ds.shape[:-1], -1, cut.reports), -2, 0)
        add = partial(_block_gradients, cut, v, gram)
        (dv, dgram), dwords = lax.scan(add, zeros, (*reports, ds, dwords))
        return dwords, dv + _product("...rq,...qd->...rd", dgram.astype(v.dtype), v)

    dwords = jnp.zeros(reports[0].shape, jnp.float32)
    run = partial(lax.scan, some) if cut.by_image else some
    dwords, dv = run(dwords, (regions, ds))
    return dv.astype(regions.dtype), dwords.reshape(words.shape).astype(words.dtype), None


def _forward(regions: Array, words: Array, mask: Array, cut: _Cut) -> tuple[Array, tuple]:
    return _similarity(regions, words, mask, cut), (regions, words, mask)


_similarity.defvjp(_forward, _backward)
