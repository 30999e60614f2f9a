"""Draws latents from a denoiser: one scan over a table of `schedule.py`, jitted by the caller.

The denoiser is a function `denoise(x, t, context)` of n noisy latents [n, h, w, c] (float32), their
times [n] (float32) and their text states [n, s, d]; it returns [n, h, w, c] in any float type. With
a feature cache (DeepCache, arXiv 2312.00858) it is a pair of functions:

    full(x, t, context) -> (output, deep)             deep: a tree of arrays with axis 0 of length n
    shallow(x, t, context, deep) -> output            skips the layers that made `deep`
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from medsyn_jax.diffusion.schedule import Table

Denoise = Callable[..., Array] | tuple[Callable[..., tuple[Array, Any]], Callable[..., Array]]


def record_noise(
    key: Key[Array, ""], indices: Int[Array, " b"], shape: tuple[int, ...]
) -> Float[Array, "b ..."]:
    """Standard normal noise of one `shape` a record, a function of `key` and its index alone:
    the same in any batch, on any number of devices and after any restart."""
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(indices)


def plan(
    sigma: Array | np.ndarray, *, guidance: float, interval: tuple[float, float], cache_every: int
) -> tuple[Bool[Array, " s"], Bool[Array, " s"]]:
    """(guided, full): whether each step is evaluated both with and without the text, and whether
    with all layers. `sample` explains the arguments; sigma is `table.steps.sigma`."""
    sigma = jnp.asarray(sigma)
    low, high = interval
    guided = (sigma > low) & (sigma <= high) & (guidance != 1)
    # Where guidance sets in, no earlier step has made the deep features without the text.
    sets_in = guided & ~jnp.roll(guided, 1)
    return guided, (jnp.arange(len(sigma)) % cache_every == 0) | sets_in


def sample(
    denoise: Denoise,
    noise: Float[Array, "b h w c"],
    context: Float[Array, "b s d"],
    uncond: Float[Array, "u s d"] | None,
    table: Table,
    *,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, math.inf),
    rescale: float = 0.0,
    cache_every: int = 1,
) -> tuple[Float[Array, "b h w c"], Int[Array, " b"]]:
    """(latents, bad_step): the end of sampling, and the first step after which the latents of a
    record were not finite, -1 if they always were.

    noise: standard normal, float32. context: the text states of each record. uncond: those of the
    empty prompt, of length b or 1; not read when guidance is 1. guidance: weight w of
    classifier-free guidance, u + w (c - u) of the outputs without (u) and with (c) the text (arXiv
    2207.12598), from one call of 2 b records in which the two halves of a record are neighbors, so
    that a batch sharded over devices stays there. interval: guide only where low < sigma <= high
    (arXiv 2404.07724), with sigma the noise level sqrt((1 - a) / a) in which the paper states its
    intervals; a step outside costs one call of b records. rescale: share in [0, 1] of the guided
    output that is scaled back to the standard deviation of c (arXiv 2305.08891, section 3.4).
    cache_every: with a pair of denoisers, all layers run in every cache_every-th step, and where
    guidance sets in. The options are static.
    """
    assert cache_every == 1 or isinstance(denoise, tuple), "a feature cache needs two functions"
    evaluate = _evaluator(denoise, context, uncond if guidance != 1 else None, guidance, rescale)
    some, none = interval[0] > 0 or interval[1] < math.inf, guidance == 1
    guideds = [False, True] if some and not none else [not none]
    fulls = [False, True] if cache_every > 1 else [True]
    branches = [functools.partial(evaluate, g, f) for g in guideds for f in fulls]
    guided, full = plan(
        table.steps.sigma, guidance=guidance, interval=interval, cache_every=cache_every
    )
    # The branch of each step; 0 if there is only one.
    branch = guided.astype(jnp.int32) * ((len(guideds) - 1) * len(fulls))
    branch += full.astype(jnp.int32) * (len(fulls) - 1)

    def step(carry: tuple, row: tuple) -> tuple[tuple, None]:
        x, last, history, deep, bad = carry
        i, branch, at = row
        output, deep = jax.lax.switch(branch, branches, at.scale * x, at.time, deep)
        entries = (_weigh(at.entry, (x, output)), *history)
        states = (x, last, *entries)
        x, last = _weigh(at.mix[0], states), _weigh(at.mix[1], states)
        not_finite = ~jnp.isfinite(x).all((1, 2, 3))
        bad = jnp.where((bad < 0) & not_finite, i, bad)
        return (x, last, entries[:-1], deep, bad), None

    x = noise * table.init_sigma
    history = (jnp.zeros_like(x),) * (table.steps.mix.shape[-1] - 3)
    deep = ()
    if isinstance(denoise, tuple):
        shapes = jax.eval_shape(
            functools.partial(evaluate, not none, True), x, table.steps.time[0], None
        )
        deep = jax.tree.map(lambda d: jnp.zeros(d.shape, d.dtype), shapes[1])
    carry = (x, jnp.zeros_like(x), history, deep, jnp.full(len(x), -1))
    rows = (jnp.arange(len(branch)), branch, table.steps)
    (x, _, _, _, bad), _ = jax.lax.scan(step, carry, rows)
    return x, bad


def _evaluator(
    denoise: Denoise, context: Array, uncond: Array | None, guidance: float, rescale: float
) -> Callable[..., tuple[Array, Any]]:
    """evaluate(guided, full, x, t, deep) -> (output in float32, deep).

    deep: of pairs (without, with the text) if there is `uncond`, even in a step without guidance.
    """
    pair = denoise if isinstance(denoise, tuple) else (lambda *a: (denoise(*a), ()), None)
    contexts = None if uncond is None else _pair(jnp.broadcast_to(uncond, context.shape), context)

    def evaluate(guided: bool, full: bool, x: Array, t: Array, deep: Any) -> tuple[Array, Any]:
        half = contexts is not None and not guided  # only the half of `deep` with the text is read
        x, states = (_pair(x, x), contexts) if guided else (x, context)
        inputs = x, jnp.full(len(x), t), states
        if full:
            output, new = pair[0](*inputs)
            if half:
                # The half without the text is computed anew before it is read (see `plan`).
                new = jax.tree.map(lambda d: _pair(d, d), new)
        else:
            assert pair[1] is not None
            new = deep
            cached = jax.tree.map(lambda d: _halves(d)[1], deep) if half else deep
            output = pair[1](*inputs, cached)
        output = output.astype(jnp.float32)
        return _guide(*_halves(output), guidance, rescale) if guided else output, new

    return evaluate


def _guide(uncond: Array, cond: Array, guidance: float, rescale: float) -> Array:
    guided = uncond + guidance * (cond - uncond)
    if rescale:
        ratio = cond.std((1, 2, 3), keepdims=True) / guided.std((1, 2, 3), keepdims=True)
        guided = rescale * (guided * ratio) + (1 - rescale) * guided
    return guided


def _weigh(weights: Array, arrays: Sequence[Array]) -> Array:
    """A weighted sum, element by element: a matmul would round to bf16 on some devices."""
    return functools.reduce(jnp.add, (w * a for w, a in zip(weights, arrays, strict=True)))


def _pair(first: Array, second: Array) -> Array:
    """[2 b, ...]: first[0], second[0], first[1], ..."""
    return jnp.stack([first, second], 1).reshape(-1, *first.shape[1:])


def _halves(pairs: Array) -> tuple[Array, Array]:
    """The inverse of `_pair`."""
    pairs = pairs.reshape(-1, 2, *pairs.shape[1:])
    return pairs[:, 0], pairs[:, 1]
