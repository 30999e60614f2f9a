"""The loader's images to an encoder's input, on the device and inside the jitted step.

Crops, scalings and shifts are two matrix products per record (`jax.image.scale_and_translate`);
only a rotation needs a gather. Each record has its own key: `split(key, b)`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from medsyn_jax.core import checks
from medsyn_jax.core.errors import UserError

Range = tuple[float, float]
PIXELS = ("mean", "std", "channels", "upsample")  # an encoder's settings of its input


def normalize(
    images: UInt8[Array, "b h w"],
    *,
    mean: float = 0.5,
    std: float = 0.25,
    channels: int = 1,
    upsample: int = 0,
) -> Float[Array, "b p q c"]:
    """(images / 255 - mean) / std in fp32, the grey level repeated over `channels`.

    upsample: side in pixels after enlargement, corner on corner (torch's bilinear
    `Upsample(align_corners=True)`, as in GLoRIA and MGCA); 0 for none.
    """
    return _finished(images.astype(jnp.float32) / 255.0, mean, std, channels, upsample)


def _finished(x: Array, mean: float, std: float, channels: int, upsample: int) -> Array:
    x = (x - mean) / std
    if upsample:
        scale = jnp.array([(upsample - 1) / max(n - 1, 1) for n in x.shape[1:]], jnp.float32)
        shape, shift = (upsample, upsample), 0.5 - 0.5 * scale
        x = jax.vmap(
            lambda image: jax.image.scale_and_translate(
                image, shape, (0, 1), scale, shift, "linear", antialias=False
            )
        )(x)
    return jnp.broadcast_to(x[..., None], (*x.shape, channels))


def center_crop(images: UInt8[Array, "b h w"], size: int) -> UInt8[Array, "b s s"]:
    """The central `size` x `size` pixels, for evaluation.

    Raises UserError if the images are smaller.
    """
    if size > min(images.shape[1:]):
        raise UserError(
            f"config.augment.size: {size} is more than the {min(images.shape[1:])} pixels of "
            "config.data.size: evaluation crops, it does not enlarge"
        )
    top, left = ((n - size) // 2 for n in images.shape[1:])
    return images[:, top : top + size, left : left + size]


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w"],
    *,
    size: int,
    area: Range = (1.0, 1.0),
    aspect: Range = (1.0, 1.0),
    flip: float = 0.0,
    rotate: float = 0.0,
    shift: float = 0.0,
    zoom: Range = (1.0, 1.0),
    jitter: Range = (1.0, 1.0),
    blur: Range = (0.0, 0.0),
    mean: float = 0.5,
    std: float = 0.25,
    channels: int = 1,
    upsample: int = 0,
) -> Float[Array, "b p q c"]:
    """Random views of a batch, as in ConVIRT (arXiv 2010.00747, 3.3) and its successors.

    area: share of the image in the crop; aspect: width / height of the crop (drawn in the
    logarithm). flip: probability of a left-right flip. rotate: degrees to either side. shift: share
    of the crop's side, to either side. zoom: scaling of the crop about its centre. jitter: range of
    both the brightness and the contrast factor. blur: range of the Gaussian's sigma in pixels.
    Pixels outside the stored image are black. Returns fp32 views of `size`, finished as in
    `normalize`.
    """

    def one(key: Array, image: Array) -> Array:
        k = jax.random.split(key, 8)
        h, w = (float(n) for n in image.shape)
        side = jnp.sqrt(_uniform(k[0], area))
        ratio = jnp.exp(
            0.5 * jax.random.uniform(k[1], (), minval=jnp.log(aspect[0]), maxval=jnp.log(aspect[1]))
        )
        crop = jnp.minimum(jnp.stack([side / ratio, side * ratio]), 1.0) * jnp.array([h, w])
        corner = jax.random.uniform(k[2], (2,)) * (jnp.array([h, w]) - crop)
        centre = corner + crop / 2 + _uniform(k[3], (-shift, shift), (2,)) * crop
        crop = crop / _uniform(k[4], zoom)
        x = image.astype(jnp.float32) / 255.0
        if rotate:
            x = _rotated(x, centre, crop, jnp.deg2rad(_uniform(k[5], (-rotate, rotate))), size)
        else:
            scale = size / crop
            x = jax.image.scale_and_translate(
                x, (size, size), (0, 1), scale, size / 2 - centre * scale, "linear"
            )
        if flip:
            x = jnp.where(jax.random.bernoulli(k[6], flip), x[:, ::-1], x)
        return _toned(k[7], x, jitter, blur)

    x = jax.vmap(one)(jax.random.split(key, images.shape[0]), images)
    return _finished(x, mean, std, channels, upsample)


def rules(section: str) -> tuple[checks.Rule, ...]:
    """Checks of a config's section with the fields of `augment`."""
    return (
        checks.numbers("above 0", section, "aspect zoom"),
        checks.numbers("from 0", section, "rotate shift jitter blur"),
        checks.numbers("share", section, "flip"),
        checks.numbers("part", section, "area"),
        checks.ranges(section, "area aspect zoom jitter blur"),
    )


def augment_pair(
    key: Key[Array, ""],
    images: UInt8[Array, "b h h"],
    masks: UInt8[Array, "b h h"],
    *,
    probability: float,
    zoom: Range,
    rotate: float,
    mean: float = 0.5,
    std: float = 0.25,
    channels: int = 1,
) -> tuple[Float[Array, "b h h c"], Float[Array, "b h h"]]:
    """The same random view of an image and its mask, scaled and turned about the centre.

    probability: of both together; other records stay as they are. zoom: range of the scaling.
    rotate: degrees to either side. Images are sampled bilinearly, masks (0 to 255) at the nearest
    pixel; outside of them is black. Returns images as `normalize` does, and masks from 0 to 1.
    """

    def one(key: Array, image: Array, mask: Array) -> tuple[Array, Array]:
        changed, scale, turn = jax.random.split(key, 3)
        side = jnp.full(2, image.shape[0], jnp.float32)
        apply = jax.random.bernoulli(changed, probability)
        factor = jnp.where(apply, _uniform(scale, zoom), 1.0)
        angle = jnp.where(apply, jnp.deg2rad(_uniform(turn, (-rotate, rotate))), 0.0)
        view = (side / 2, side / factor, angle, image.shape[0])
        image, mask = (x.astype(jnp.float32) / 255.0 for x in (image, mask))
        return _rotated(image, *view), _rotated(mask, *view, order=0)

    x, t = jax.vmap(one)(jax.random.split(key, images.shape[0]), images, masks)
    return _finished(x, mean, std, channels, 0), t


def _uniform(key: Array, bounds: Range, shape: tuple[int, ...] = ()) -> Array:
    return jax.random.uniform(key, shape, minval=bounds[0], maxval=bounds[1])


def _rotated(
    x: Array, centre: Array, crop: Array, angle: Array, size: int, order: int = 1
) -> Array:
    """Samples of `x` on a size x size grid over `crop`, turned about `centre`: bilinear (order 1)
    or of the nearest pixel (0)."""
    grid = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size - 0.5
    v, u = jnp.meshgrid(grid * crop[0], grid * crop[1], indexing="ij")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rows = centre[0] + cos * v - sin * u - 0.5
    columns = centre[1] + sin * v + cos * u - 0.5
    return jax.scipy.ndimage.map_coordinates(x, [rows, columns], order, mode="constant")


def _toned(key: Array, x: Array, jitter: Range, blur: Range) -> Array:
    bright, contrast, soft = jax.random.split(key, 3)
    if jitter != (1.0, 1.0):
        x = jnp.clip(x * _uniform(bright, jitter), 0.0, 1.0)
        middle = x.mean()
        x = jnp.clip(middle + (x - middle) * _uniform(contrast, jitter), 0.0, 1.0)
    if blur != (0.0, 0.0):
        i = jnp.arange(x.shape[0], dtype=jnp.float32)
        sigma = jnp.maximum(_uniform(soft, blur), 1e-3)
        kernel = jax.nn.softmax(-0.5 * jnp.square((i[:, None] - i[None]) / sigma), axis=-1)
        with jax.default_matmul_precision("float32"):  # as `scale_and_translate` does
            x = kernel @ x @ kernel.T
    return x
