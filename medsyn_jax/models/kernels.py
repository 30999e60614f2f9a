"""The heavy operations of the encoders, with gradients written out where that is faster.

Accelerators run XLA's convolutions and pooling. On CPU, XLA's gradients of 1 x 1 convolutions and
max-pooling are several times slower than the equivalent matrix products and selections, which
therefore replace them, and 3 x 3 convolutions of many channels are products of tiles. Values and
gradients are the same: docs/performance.md has the measurements, tests/models/test_kernels.py the
comparisons.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

_NHWC = ("NHWC", "HWIO", "NHWC")
_FEW = 2  # patches pay if the kernel has at least so many outputs for each pixel of a batch
_WIDE = 256  # tiles pay from so many channels and pixels of a batch on,
_LARGE = ((28, 64), (112, 32))  # and for images of so many rows from so many channels on,
_TILED = 2**23  # up to so many elements of an image
_CHUNK = 2**21  # elements that are tiled at a time, so that their sums stay in the cache


def along_last(x: Float[Array, " f"], ndim: int) -> Float[Array, "..."]:
    """A vector along the last of `ndim` axes, since implicit rank promotion is an error here."""
    return x.reshape((1,) * (ndim - 1) + x.shape)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The matrix product of two matrices over one axis of each."""
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())))


@jax.custom_vjp
def _matrix_product(x: Float[Array, "m k"], kernel: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return _product(x, kernel, 1, 0)


def _matrix_product_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """XLA:CPU transposes the first factor of x^T dy in memory: that should be the narrower one.

    The other order does not pay where the product is large, because each of its readers transposes
    it. Without the barrier XLA would simplify the transposed product back into the first order.
    """
    x, kernel = saved
    if x.size <= dy.size + 3 * kernel.size:
        outer = _product(x, dy, 0, 0)
    else:
        outer = lax.optimization_barrier(_product(dy, x, 0, 0)).T
    return _product(dy, kernel, 1, 1), outer


_matrix_product.defvjp(lambda x, w: (_product(x, w, 1, 0), (x, w)), _matrix_product_backward)


def _flat_matmul(x: Array, kernel: Array) -> Array:
    y = _matrix_product(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def matmul(x: Float[Array, "*n i"], kernel: Float[Array, "i o"]) -> Float[Array, "*n o"]:
    """x @ kernel."""
    return lax.platform_dependent(x, kernel, cpu=_flat_matmul, default=jnp.matmul)


def gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The exact GELU, x Phi(x), in float32 by erf, which is faster than jax.nn's erfc."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


def _convolution(x: Array, kernel: Array, stride: int) -> Array:
    pad = (kernel.shape[0] - 1) // 2
    edges = ((pad, pad), (pad, pad))
    return lax.conv_general_dilated(x, kernel, (stride, stride), edges, dimension_numbers=_NHWC)


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"], stride: int
) -> Float[Array, "b p q o"]:
    """Cross-correlation with (k - 1) // 2 zeros on every side."""
    native = functools.partial(_convolution, stride=stride)
    if kernel.shape[0] == 1:
        as_product = functools.partial(_pointwise, stride=stride)
    elif stride == 1 and _FEW * _pixels(x) <= kernel.shape[-1]:
        as_product = _by_patches
    elif stride == 1 and _tiled(x, kernel):
        as_product = _by_tiles
    else:
        return native(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=as_product, default=native)


def convolve_doubled(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b 2*h 2*w o"]:
    """`convolve` of x enlarged to twice its rows and columns by nearest neighbour.

    The taps of a pixel's four copies are summed, and x is convolved once with four times the
    outputs: the enlarged image is not made.
    """
    kernels = [by_row for half in _halves(kernel) for by_row in _halves(half.swapaxes(0, 1))]
    y = convolve(x, jnp.concatenate([k.swapaxes(0, 1) for k in kernels], -1), 1)
    b, h, w, _ = x.shape
    y = y.reshape(b, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(b, 2 * h, 2 * w, -1)


def _halves(kernel: Float[Array, "3 s i o"]) -> tuple[Array, Array]:
    """The kernels along the first axis of the even and of the odd outputs, for pixels that are
    doubled."""
    first, middle, last = kernel
    nothing = jnp.zeros_like(first)
    return jnp.stack([first, middle + last, nothing]), jnp.stack([nothing, first + middle, last])


def _pixels(x: Array) -> int:
    return x.size // x.shape[-1]


def _pointwise(x: Array, kernel: Array, stride: int) -> Array:
    return _flat_matmul(x[:, ::stride, ::stride], kernel[0, 0])


def _by_patches(x: Float[Array, "b h w i"], kernel: Float[Array, "k k i o"]) -> Array:
    """One product of all patches and the kernel, for kernels much larger than the images."""
    size, (h, w) = kernel.shape[0], x.shape[1:3]
    edge = (size - 1) // 2
    x = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    taps = [x[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    patches = lax.optimization_barrier(jnp.concatenate(taps, -1))
    return _flat_matmul(patches, kernel.reshape(-1, kernel.shape[-1]))


def _tiled(x: Array, kernel: Array) -> bool:
    """Whether tiles pay, fit in memory (their sums have 4 times the elements) and are precise."""
    narrow, rows = min(kernel.shape[2:]), min(x.shape[1:3])
    pays = narrow >= _WIDE and _pixels(x) > _WIDE
    pays = pays or any(rows >= fewest and narrow >= width for fewest, width in _LARGE)
    fits = x.size <= _TILED * len(x)
    return kernel.shape[0] == 3 and pays and fits and x.dtype == jnp.float32


def _sums_of_four(x: Array, axis: int) -> list[Array]:
    """B^T d for the tiles d of four elements that start at every second place of an axis."""
    tiles = x.shape[axis] // 2 - 1

    def at(place: int) -> Array:
        return lax.slice_in_dim(x, place, place + 2 * tiles - 1, 2, axis)

    return [at(0) - at(2), at(1) + at(2), at(2) - at(1), at(1) - at(3)]


def _sums_of_three(kernel: Array) -> list[Array]:
    """G g for the taps g along the first axis."""
    ends, middle = 0.5 * (kernel[0] + kernel[2]), 0.5 * kernel[1]
    return [kernel[0], ends + middle, ends - middle, kernel[2]]


def _both_of_tile(m: Sequence[Array]) -> list[Array]:
    """A^T m: the two outputs of a tile along an axis, from its four products."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _taps_of_tile(kernel: Float[Array, "3 3 i o"]) -> list[Float[Array, "i o"]]:
    """G g G^T, row by row."""
    return [tap for rows in _sums_of_three(kernel) for tap in _sums_of_three(rows)]


def _tile_products(x: Float[Array, "b h w i"], taps: Sequence[Array], axis: int) -> Array:
    """The convolution by 16 products over the channels and `axis` of the taps."""
    b, h, w, i = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0)))
    tiles = [tile for rows in _sums_of_four(x, 1) for tile in _sums_of_four(rows, 2)]
    m = [_product(d.reshape(-1, i), g, 1, axis) for d, g in zip(tiles, taps, strict=True)]
    by_column = [_both_of_tile(m[4 * row : 4 * row + 4]) for row in range(4)]
    columns = [_both_of_tile(column) for column in zip(*by_column, strict=True)]
    rows = [jnp.stack(pair, 1) for pair in zip(*columns, strict=True)]
    p, q = tiles[0].shape[1:3]
    y = jnp.stack([row.reshape(b, p, 2 * q, -1) for row in rows], 2)
    return y.reshape(b, 2 * p, 2 * q, -1)[:, :h, :w]


def _tile_convolution(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Array:
    """Winograd's F(2 x 2, 3 x 3): 16 products for four outputs, not 36 (Lavin and Gray,
    arXiv 1509.09308)."""
    taps = _taps_of_tile(kernel)
    return _joined(lax.map(lambda part: _tile_products(part, taps, 0), _chunks(x, kernel)))


def _tile_convolution_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """The gradients are convolutions by tiles too, which are computed anew and not kept."""
    x, kernel = saved
    taps = _taps_of_tile(kernel)
    turned = [taps[4 * row + column] for row in (3, 1, 2, 0) for column in (3, 1, 2, 0)]
    slopes = _chunks(dy, kernel)
    dx = _joined(lax.map(lambda part: _tile_products(part, turned, 1), slopes))
    if 3 * x.size < kernel.size:  # the sums over the kernel's 16 taps would cost too much
        _, transpose = jax.vjp(lambda kernel: _convolution(x, kernel, 1), kernel)
        return dx, *transpose(dy)

    def add(total: list[Array], chunk: tuple[Array, Array]) -> tuple[list[Array], None]:
        part, slope = chunk
        _, transpose = jax.vjp(lambda taps: _tile_products(part, taps, 0), taps)
        return jax.tree.map(jnp.add, total, *transpose(slope)), None

    nothing = jax.tree.map(jnp.zeros_like, taps)
    total, _ = lax.scan(add, nothing, (_chunks(x, kernel), slopes))
    return dx, *jax.linear_transpose(_taps_of_tile, kernel)(total)


def _chunks(x: Array, kernel: Array) -> Float[Array, "n c h w f"]:
    """The images in equal parts, each of at most `_CHUNK` inputs or outputs, or of one image."""
    an_image = _pixels(x) // len(x) * max(kernel.shape[2:])
    most = max(1, _CHUNK // an_image)
    images = max(c for c in range(1, len(x) + 1) if len(x) % c == 0 and c <= most)
    return x.reshape(-1, images, *x.shape[1:])


def _joined(parts: Float[Array, "n c h w f"]) -> Float[Array, "b h w f"]:
    return parts.reshape(-1, *parts.shape[2:])


_by_tiles = jax.custom_vjp(_tile_convolution)
_by_tiles.defvjp(lambda x, kernel: (_by_tiles(x, kernel), (x, kernel)), _tile_convolution_backward)


def _max_pool_native(x: Array) -> Array:
    lowest = np.array(-np.inf, x.dtype)
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, lowest, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), edges)


def _taps(x: Float[Array, "b h w f"]) -> list[Float[Array, "b p q f"]]:
    """The nine pixels of every 3 x 3 window, row by row, as nine images."""
    b, h, w, f = x.shape
    bottom, right = (h + 1) // 2 * 2 - 1, (w + 1) // 2 * 2 - 1
    lowest = np.array(-np.inf, x.dtype)
    x = lax.pad(x, lowest, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    return [
        lax.slice(x, (0, i, j, 0), (b, i + bottom, j + right, f), (1, 2, 2, 1))
        for i in range(3)
        for j in range(3)
    ]


@jax.custom_vjp
def _max_pool_taps(x: Array) -> Array:
    return functools.reduce(jnp.maximum, _taps(x))


def _max_pool_forward(x: Array) -> tuple[Array, tuple[Array, tuple[int, ...]]]:
    """The maxima, and the number of each one's tap: the first of equal taps, as in torch."""
    taps = _taps(x)
    best, which = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for number, tap in enumerate(taps[1:], 1):
        which = jnp.where(tap > best, jnp.int8(number), which)
        best = jnp.maximum(best, tap)
    return best, (which, x.shape)


def _max_pool_backward(saved: tuple[Int8[Array, "b p q f"], tuple], dy: Array) -> tuple[Array]:
    """A pixel of even row and column is in one window, one of odd row and column in four."""
    which, (b, h, w, f) = saved
    p, q = dy.shape[1:3]
    edge = ((0, 0), (0, 1), (0, 1), (0, 0))
    which, dy = jnp.pad(which, edge, constant_values=-1), jnp.pad(dy, edge)

    def share(i: int, j: int) -> Array:
        """The gradients of pixels as tap (i, j) of their windows: pixel 2 p + i - 1 of window p."""
        start = (0, int(i == 0), int(j == 0), 0)
        stop = (b, start[1] + p, start[2] + q, f)
        chosen = lax.slice(which, start, stop) == 3 * i + j
        return jnp.where(chosen, lax.slice(dy, start, stop), 0)

    even = jnp.stack([share(1, 1), share(1, 2) + share(1, 0)], 3)
    odd = jnp.stack(
        [share(2, 1) + share(0, 1), share(2, 2) + share(2, 0) + share(0, 2) + share(0, 0)], 3
    )
    return (jnp.stack([even, odd], 2).reshape(b, 2 * p, 2 * q, f)[:, :h, :w],)


_max_pool_taps.defvjp(_max_pool_forward, _max_pool_backward)


def max_pool(x: Float[Array, "b h w f"]) -> Float[Array, "b p q f"]:
    """The maximum over 3 x 3 windows, stride 2, one pixel of padding, of the ResNet's stem."""
    return lax.platform_dependent(x, cpu=_max_pool_taps, default=_max_pool_native)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalize(
    x: Float[Array, "*n f"],
    scale: Float[Array, " f"],
    bias: Float[Array, " f"],
    shortcut: Float[Array, "*n f"] | None,
    eps: float,
    relu: bool,
) -> tuple[Float[Array, "*n f"], Float[Array, " f"], Float[Array, " f"]]:
    """y, mean, variance of batch normalization over all axes but the last, plus shortcut and ReLU.

    The backward pass of the three together reads and keeps no more than x and y, which is half the
    memory traffic of the three one by one on every platform. The mean and the (biased) variance are
    float32 and not differentiated.
    """
    return _normalize_forward(x, scale, bias, shortcut, eps, relu)[0]


def _normalize_forward(
    x: Array, scale: Array, bias: Array, shortcut: Array | None, eps: float, relu: bool
) -> tuple[tuple[Array, Array, Array], tuple]:
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = wide.mean(axes)
    var = jnp.square(wide - along_last(mean, x.ndim)).mean(axes)
    inverse = lax.rsqrt(var + eps)
    y = rescale(x, inverse * scale, bias - mean * inverse * scale, shortcut, relu)
    kept = y if relu else None
    return (y, mean, var), (x, scale, mean, inverse, kept, shortcut is not None)


def rescale(
    x: Float[Array, "*n f"],
    factor: Float[Array, " f"],
    shift: Float[Array, " f"],
    shortcut: Float[Array, "*n f"] | None,
    relu: bool,
) -> Float[Array, "*n f"]:
    """factor x + shift + shortcut, rectified if `relu`, computed in float32."""
    y = x.astype(jnp.float32) * along_last(factor, x.ndim) + along_last(shift, x.ndim)
    y = y if shortcut is None else y + shortcut.astype(jnp.float32)
    return (jax.nn.relu(y) if relu else y).astype(x.dtype)


def _normalize_backward(eps: float, relu: bool, saved: tuple, dys: tuple) -> tuple:
    del eps
    x, scale, mean, inverse, y, has_shortcut = saved
    dy = jnp.where(y > 0, dys[0], 0) if relu else dys[0]
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    wide, slope = x.astype(jnp.float32), dy.astype(jnp.float32)
    dbias = slope.sum(axes)
    dscale = ((slope * wide).sum(axes) - mean * dbias) * inverse
    a = scale * inverse
    b = a * inverse * dscale / count
    centered = (wide - along_last(mean, x.ndim)) * along_last(b, x.ndim)
    dx = (slope - along_last(dbias / count, x.ndim)) * along_last(a, x.ndim) - centered
    return dx.astype(x.dtype), dscale, dbias, dy if has_shortcut else None


normalize.defvjp(_normalize_forward, _normalize_backward)
