import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import transforms

KEY = jax.random.key(0)
RAW = {"mean": 0.0, "std": 1.0}


@pytest.fixture
def images():
    ramp = np.add.outer(np.arange(32), 2 * np.arange(32)) * 2
    return jnp.asarray(np.stack([ramp, ramp[::-1], np.full((32, 32), 255)]).astype(np.uint8))


def test_no_augmentation_is_plain_normalisation(images):
    expected = transforms.normalize(images, mean=0.5, std=0.25, channels=3)
    np.testing.assert_allclose(
        transforms.augment(KEY, images, size=32, channels=3), expected, atol=1e-5
    )
    assert float(expected.max()) == 2.0
    assert expected.shape == (3, 32, 32, 3)


def test_down_scaling_keeps_the_mean(images):
    small = transforms.augment(KEY, images, size=8, **RAW)
    whole = np.asarray(images).mean((1, 2)) / 255
    np.testing.assert_allclose(small.mean((1, 2, 3)), whole, rtol=0.01)


def test_flip_is_left_right_only(images):
    flipped = transforms.augment(KEY, images, size=32, flip=1.0, **RAW)
    np.testing.assert_allclose(flipped[..., 0], np.asarray(images)[:, :, ::-1] / 255, atol=1e-5)


def test_crop_covers_the_share_of_the_area_that_was_asked_for():
    # On a ramp the range of grey values along an axis is the length of the crop along it.
    ramp = jnp.broadcast_to(jnp.arange(0, 256, 4, dtype=jnp.uint8), (64, 64, 64))
    seen = np.asarray(transforms.augment(KEY, ramp, size=16, area=(0.25, 0.25), **RAW))
    span = (seen[:, 8, -1, 0] - seen[:, 8, 0, 0]) * 255 / 4 * 16 / 15
    np.testing.assert_allclose(span, 32.0, rtol=0.05)
    starts = seen[:, 8, 0, 0]
    assert starts.std() > 0.05  # every record has a place of its own


def test_rotation_by_the_whole_circle_grid_agrees_with_the_matrix_path(images):
    # Without an angle the gather must agree with the two matrix products.
    turned = transforms.augment(KEY, images, size=32, rotate=1e-6, **RAW)
    np.testing.assert_allclose(turned, transforms.augment(KEY, images, size=32, **RAW), atol=1e-3)


def test_jitter_and_blur_stay_in_range(images):
    seen = transforms.augment(KEY, images, size=32, jitter=(0.4, 1.9), blur=(0.1, 3.0), **RAW)
    assert float(seen.min()) >= 0.0
    assert float(seen.max()) <= 1.0 + 1e-5
    soft = transforms.augment(KEY, images, size=32, blur=(4.0, 4.0), **RAW)
    assert float(soft[0].std()) < float(transforms.augment(KEY, images, size=32, **RAW)[0].std())


def test_views_depend_on_the_place_in_the_batch_and_the_key_alone(images):
    def view(key):
        return transforms.augment(key, images, size=16, area=(0.3, 1.0), shift=0.1, **RAW)

    np.testing.assert_array_equal(view(KEY), view(KEY))
    assert float(jnp.abs(view(KEY) - view(jax.random.key(1))).max()) > 0.01


def test_centre_crop():
    x = jnp.arange(36, dtype=jnp.uint8).reshape(1, 6, 6)
    np.testing.assert_array_equal(transforms.center_crop(x, 2)[0], [[14, 15], [20, 21]])


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(UserError, match=r"config.augment.size: 8 is more than the 6 pixels"):
        transforms.center_crop(jnp.zeros((1, 6, 6), jnp.uint8), 8)


def test_upsampling_keeps_the_corners_and_is_linear_between():
    """As torch's Upsample(align_corners=True): the corners stay where they are."""
    images = jnp.asarray(np.arange(12, dtype=np.uint8).reshape(1, 3, 4) * 20)
    found = transforms.normalize(images, mean=0.0, std=1.0, upsample=7)[0, :, :, 0] * 255
    rows, columns = np.linspace(0, 2, 7), np.linspace(0, 3, 7)
    np.testing.assert_allclose(found, 80 * rows[:, None] + 20 * columns[None], atol=1e-3)


def pair(count=3, side=24):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, side, side), np.uint8)
    return jnp.asarray(images), jnp.asarray(images > 127, np.uint8) * jnp.uint8(255)


def test_pairs_that_are_not_changed_are_those_of_evaluation():
    images, masks = pair()
    settings = {"zoom": (0.9, 1.1), "rotate": 10.0, "mean": 0.4, "std": 0.2, "channels": 3}
    x, t = transforms.augment_pair(jax.random.key(0), images, masks, probability=0.0, **settings)
    want = transforms.normalize(images, mean=0.4, std=0.2, channels=3)
    np.testing.assert_allclose(x, want, atol=1e-5)
    np.testing.assert_array_equal(t, np.asarray(masks) / np.float32(255))


def test_an_image_and_its_mask_are_turned_and_scaled_alike():
    """A disc beside the centre, as bright in the image as in the mask, keeps its place in both."""
    rows, columns = np.mgrid[:64, :64]
    disc = ((rows - 20) ** 2 + (columns - 44) ** 2 < 64).astype(np.uint8) * np.uint8(255)
    images = jnp.broadcast_to(disc[None], (16, 64, 64))
    settings = {"zoom": (0.9, 1.1), "rotate": 10.0, "mean": 0.0, "std": 1.0}
    x, t = transforms.augment_pair(jax.random.key(1), images, images, probability=1.0, **settings)
    x, t = np.asarray(x[..., 0]), np.asarray(t)
    assert set(np.unique(t)) == {0.0, 1.0}  # the nearest pixel, not a mean
    assert (np.abs(x - t) > 0.5).mean() < 1e-3
    areas, places = t.sum((1, 2)), np.argwhere(t[0]).mean(0)
    assert 0.9**2 * 0.95 < areas.min() / (disc > 0).sum() < areas.max() / (disc > 0).sum() < 1.3
    distance = np.hypot(*(places - 31.5)) / np.hypot(20 - 31.5, 44 - 31.5)
    assert 0.89 < distance < 1.11
    assert len({tuple(np.argwhere(m).mean(0).round(2)) for m in t}) == 16  # each view its own
    half, _ = transforms.augment_pair(
        jax.random.key(1), images, images, probability=0.5, **settings
    )
    changed = (np.abs(np.asarray(half[..., 0]) - disc / np.float32(255)) > 0.5).any((1, 2))
    assert 0 < changed.sum() < 16
