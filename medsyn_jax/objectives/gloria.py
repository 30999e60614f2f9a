"""GLoRIA's global and local contrastive objectives (Huang et al., ICCV 2021), on global arrays.

For image i with regions v_r and report j with words w:

    s_rw = v_r . w
    a    = softmax of s over the words (real ones only)
    b    = softmax of tau1 a over the regions
    c_w  = sum_r b_rw v_r
    S_ij = log sum_w exp(tau2 cos(w, c_w))

Neither side is normalized, as in the official code. c_w is never formed: w . c_w = sum_r b_rw s_rw,
and |c_w|^2 = b_w' G b_w with G = V V' of the image, which is fewer FLOPs where an image has fewer
regions than a region has dimensions.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from medsyn_jax.objectives.contrastive import contrastive_loss

_EPS = 1e-16  # of the squared norms' product: that of torch's cosine similarity
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

    word_mask: True on real words. A report without any has S = 0 and no gradient. memory_mib: how
    much a block of pairs may take; no more of the i x r x j x w numbers exist at a time, in the
    forward pass or in the backward pass, which computes them anew. On CPU a block is one image and
    as many reports as fit: products of plain matrices. On accelerators it is all images.
    mesh: over all of whose devices images and reports are sharded. Each keeps its own images and
    visits all reports: their words are gathered once, the words' gradient is scattered once.
    Raises ValueError for a tau that is not above 0.
    """
    for name, tau in {"tau1": tau1, "tau2": tau2}.items():
        if not tau > 0:
            raise ValueError(f"{name}: {tau}: give a number above 0")
    each = _ARRAYS * 4 * regions.shape[1] * words.shape[1]
    devices = 1 if mesh is None else mesh.size
    budget, i, j = memory_mib * 2**20, len(regions) // devices, len(words)

    def cut(images: int) -> _Cut:
        reports = [n for n in range(1, j + 1) if j % n == 0 and n * images * each <= budget]
        return _Cut(images, max(reports, default=1), float(tau1), float(tau2))

    by_image, by_report = (partial(_similarity, cut=cut(images)) for images in (1, i))
    here = partial(lax.platform_dependent, cpu=by_image, default=by_report)
    if devices == 1:
        return here(regions, words, word_mask)

    def with_all(own: Array, words: Array, mask: Array) -> Array:
        return here(own, *(lax.all_gather(x, mesh.axis_names, tiled=True) for x in (words, mask)))

    rows = P(mesh.axis_names)
    mapped = jax.shard_map(
        with_all, mesh=mesh, in_specs=(rows,) * 3, out_specs=rows, check_vma=False
    )
    return mapped(regions, words, word_mask)


def local_loss(
    regions: Float[Array, "b r d"],
    words: Float[Array, "b w d"],
    word_mask: Bool[Array, "b w"],
    *,
    tau1: float = 4.0,
    tau2: float = 5.0,
    tau3: float = 10.0,
    memory_mib: int = 512,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of the cross-entropies of tau3 S against the diagonal, both ways; (loss, metrics)."""
    if not tau3 > 0:
        raise ValueError(f"tau3: {tau3}: give a number above 0")
    scores = local_similarity(
        regions, words, word_mask, tau1=tau1, tau2=tau2, memory_mib=memory_mib, mesh=mesh
    )
    logits, own = tau3 * scores, jnp.arange(len(regions))
    to_text = optax.softmax_cross_entropy_with_integer_labels(logits, own).mean()
    to_image = optax.softmax_cross_entropy_with_integer_labels(logits.T, own).mean()
    return to_text + to_image, {"image_to_text": to_text, "text_to_image": to_image}


def global_loss(
    image: Float[Array, "b d"], text: Float[Array, "b d"], *, tau3: float = 10.0
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum of the cross-entropies of tau3 cos against the diagonal, both ways; (loss, metrics)."""
    if not tau3 > 0:
        raise ValueError(f"tau3: {tau3}: give a number above 0")
    return contrastive_loss(image, text, temperature=1 / tau3)


class _Cut(NamedTuple):
    """How many images and reports a block has, and the temperatures: what is static."""

    images: int
    reports: int
    tau1: float
    tau2: float


class _Block(NamedTuple):
    """What the pairs of m images and n reports have, fp32."""

    a: Float[Array, "m r n w"]
    b: Float[Array, "m r n w"]
    s: Float[Array, "m r n w"]
    gb: Float[Array, "m r n w"]  # G b
    norm: Float[Array, "n w"]  # |w|^2
    quad: Float[Array, "m n w"]  # |c_w|^2
    cos: Float[Array, "m n w"]


def _product(form: str, *factors: Array) -> Array:
    """In the type of the factors, summed in fp32; an accelerator may not take fewer bits."""
    exact = lax.Precision.HIGHEST
    return jnp.einsum(form, *factors, precision=exact, preferred_element_type=jnp.float32)


def _block(v: Array, gram: Array, words: Array, mask: Array, tau1: float) -> _Block:
    s = _product("mrd,nwd->mrnw", v, words)
    real = mask[None, None]
    top = lax.stop_gradient(jnp.where(real, s, -1e30).max(-1, keepdims=True))
    raised = jnp.where(real, jnp.exp(s - top), 0)
    a = raised / jnp.maximum(raised.sum(-1, keepdims=True), 1e-30)
    # tau1 a is between 0 and tau1: half of it keeps exp in range without a maximum.
    weight = jnp.exp(tau1 * a - tau1 / 2)
    b = weight / weight.sum(1, keepdims=True)
    gb = _product("mrq,mqnw->mrnw", gram, b.astype(v.dtype))
    norm = jnp.square(words.astype(jnp.float32)).sum(-1)
    quad = (b * gb).sum(1)
    cos = (b * s).sum(1) * lax.rsqrt(jnp.maximum(quad * norm[None], _EPS))
    return _Block(a, b, s, gb, norm, quad, cos)


def _scores(cos: Array, mask: Array, tau2: float) -> tuple[Array, Array]:
    """(S [m, n], softmax of tau2 cos over the real words [m, n, w])."""
    x = jnp.where(mask[None], tau2 * cos, -jnp.inf)
    some = mask.any(-1)[None]
    score = jnp.where(some, jax.nn.logsumexp(x, -1), 0)
    return score, jnp.exp(x - score[..., None])


def _cut_up(x: Array, size: int) -> Array:
    return x.reshape(-1, size, *x.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _similarity(regions: Array, words: Array, mask: Array, cut: _Cut) -> Array:
    reports = _cut_up(words, cut.reports), _cut_up(mask, cut.reports)

    def some(v: Array) -> Array:
        gram = _product("mrd,mqd->mrq", v, v).astype(v.dtype)

        def one(block: tuple[Array, Array]) -> Array:
            cos = _block(v, gram, *block, cut.tau1).cos
            return _scores(cos, block[1], cut.tau2)[0]

        return jnp.moveaxis(lax.map(one, reports), 0, 1).reshape(len(v), -1)

    return lax.map(some, _cut_up(regions, cut.images)).reshape(len(regions), -1)


def _backward(cut: _Cut, saved: tuple[Array, Array, Array], ds: Array) -> tuple:
    """The sum over r of b times its gradient is zero, because S does not depend on the length of
    c_w: the softmax over regions is then differentiated by one product."""
    regions, words, mask = saved
    many = (len(words) // cut.reports, cut.reports)
    slopes = jnp.moveaxis(ds.reshape(-1, cut.images, *many), 2, 1)
    reports = _cut_up(words, cut.reports), _cut_up(mask, cut.reports)

    def some(dwords: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        v, slope = xs
        gram = _product("mrd,mqd->mrq", v, v).astype(v.dtype)

        def one(sums: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], Array]:
            dv, dgram = sums
            words, mask, slope, dwords = xs
            block = _block(v, gram, words, mask, cut.tau1)
            _, share = _scores(block.cos, mask, cut.tau2)
            dcos = cut.tau2 * slope[..., None] * share
            length = jnp.maximum(block.quad * block.norm[None], _EPS)
            ddot = (dcos * lax.rsqrt(length))[:, None]
            turn = dcos * block.cos / length  # minus twice the slope along |w|^2 |c_w|^2
            dquad = (-turn * block.norm[None])[:, None]
            dnorm = -(turn * block.quad).sum(0)
            da = cut.tau1 * block.b * (ddot * block.s + dquad * block.gb)
            dlogit = block.a * (da - (block.a * da).sum(-1, keepdims=True))
            dlogit = (ddot * block.b + dlogit).astype(v.dtype)
            turned = (dquad * block.b).astype(v.dtype)
            dv += _product("mrnw,nwd->mrd", dlogit, words)
            dgram += _product("mrnw,mqnw->mrq", turned, block.b.astype(v.dtype))
            more = _product("mrnw,mrd->nwd", dlogit, v)
            more += dnorm[..., None] * words.astype(jnp.float32)
            return (dv, dgram), dwords + more

        zeros = jnp.zeros(v.shape, jnp.float32), jnp.zeros(gram.shape, jnp.float32)
        (dv, dgram), dwords = lax.scan(one, zeros, (*reports, slope, dwords))
        return dwords, dv + _product("mrq,mqd->mrd", dgram.astype(v.dtype), v)

    start = jnp.zeros((*many, *words.shape[1:]), jnp.float32)
    dwords, dv = lax.scan(some, start, (_cut_up(regions, cut.images), slopes))
    like = dv.reshape(regions.shape).astype(regions.dtype)
    return like, dwords.reshape(words.shape).astype(words.dtype), None


def _forward(regions: Array, words: Array, mask: Array, cut: _Cut) -> tuple[Array, tuple]:
    return _similarity(regions, words, mask, cut), (regions, words, mask)


_similarity.defvjp(_forward, _backward)
