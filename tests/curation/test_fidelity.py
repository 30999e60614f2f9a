"""Distances against closed forms and loops, MS-SSIM against a slow version in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from medsyn_jax.core.errors import UserError
from medsyn_jax.curation import fidelity


def with_moments(rng, n: int, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """n records whose sample mean and covariance are `mean` and root root' to rounding."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T @ root.T + mean


def test_frechet_is_the_closed_form_of_two_gaussians():
    rng = np.random.default_rng(0)
    means, roots = rng.normal(size=(2, 5)), rng.normal(size=(2, 5, 5))
    a, b = (with_moments(rng, n, *m) for n, *m in zip((40, 90), means, roots, strict=True))
    one, two = (root @ root.T for root in roots)
    cross = linalg.sqrtm(one @ two).real
    want = np.square(means[0] - means[1]).sum() + np.trace(one + two - 2 * cross)
    assert fidelity.frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert fidelity.frechet_distance(b, a) == pytest.approx(want, rel=1e-9)


def test_frechet_of_independent_features_adds_up_over_them():
    rng = np.random.default_rng(1)
    mean, s, t = rng.normal(size=4), rng.uniform(1, 3, 4), rng.uniform(1, 3, 4)
    a = with_moments(rng, 30, np.zeros(4), np.diag(s))
    b = with_moments(rng, 50, mean, np.diag(t))
    want = np.square(mean).sum() + np.square(s - t).sum()
    assert fidelity.frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (5, 40), (40, 7)])
def test_frechet_with_fewer_records_than_features(n, m):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(n, 12)), 1.5 * rng.normal(size=(m, 12)) + 1
    one, two = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(one @ two).real, 0))
    shift = a.mean(axis=0) - b.mean(axis=0)
    want = shift @ shift + np.trace(one + two) - 2 * roots.sum()
    assert fidelity.frechet_distance(a, b) == pytest.approx(want, abs=1e-5)
    assert fidelity.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-10)


def test_kernel_distance_is_its_definition():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(6, 3)) + 1

    def k(p, q):
        return (sum(float(u) * float(v) for u, v in zip(p, q, strict=True)) / 3 + 1) ** 3

    within = [sum(k(s[i], s[j]) for i in range(6) for j in range(6) if i != j) / 30 for s in (x, y)]
    between = sum(k(p, q) for p in x for q in y) / 36
    mean, std = fidelity.kernel_distance(x, y, subsets=3, subset_size=6, seed=0)
    assert mean == pytest.approx(sum(within) - 2 * between, rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)  # each subset is the whole set


def test_kernel_distance_of_one_distribution_is_0_on_average_whatever_the_size():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 4000, 8))
    for size in (10, 100):
        mean, std = fidelity.kernel_distance(a, b, 300, size, seed=1)
        assert abs(mean) < 4 * std / np.sqrt(300)
        moved, _ = fidelity.kernel_distance(a, b + 0.5, 300, size, seed=1)
        assert moved > 4 * std / np.sqrt(300)


def test_synthetic_images_are_judged_by_what_two_real_halves_give():
    rng = np.random.default_rng(5)
    subjects = np.array([f"s{i // 3}" for i in range(120)])
    # Images of one subject are nearly alike: halves that shared subjects would be too near.
    real = rng.normal(size=(40, 6))[np.arange(120) // 3] + 0.1 * rng.normal(size=(120, 6))
    settings = {"draws": 8, "subsets": 5, "subset_size": 30, "seed": 0}
    alike = rng.normal(size=(90, 6))
    frechet, kernel = fidelity.compare(alike, real, subjects, **settings)
    assert frechet.n == kernel.n <= 60
    assert frechet.synthetic.shape == kernel.real.shape == (8,)
    assert 0.5 < frechet.synthetic.mean() / frechet.real.mean() < 2
    other, other_kernel = fidelity.compare(alike + 2, real, subjects, **settings)
    assert other.real.tolist() == frechet.real.tolist()
    assert other.synthetic.min() > 3 * frechet.real.max()
    assert other_kernel.synthetic.min() > 3 * kernel.real.max()
    mixed, _ = fidelity.compare(alike, real, np.arange(120).astype(str), **settings)
    assert mixed.real.mean() < 0.7 * frechet.real.mean()


@pytest.mark.parametrize(("n", "subjects"), [(1, "abcdef"), (9, "aaaaaa"), (9, "ab")])
def test_too_few_images_for_a_distance(n, subjects):
    real = np.random.default_rng(0).normal(size=(len(subjects), 3))
    settings = {"draws": 2, "subsets": 2, "subset_size": 3, "seed": 0}
    with pytest.raises(UserError, match=f"distance: {n} synthetic .* use more data"):
        fidelity.compare(np.ones((n, 3)), real, np.array(list(subjects)), **settings)
    for distance in (
        fidelity.frechet_distance,
        lambda a, b: fidelity.kernel_distance(a, b, 1, 9, 0),
    ):
        with pytest.raises(UserError, match="sets of 1 and 6 images"):
            distance(np.ones((1, 3)), np.ones((6, 3)))


def slow_ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. window by window in float64."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    sides = [min(a.shape) // 2**i for i in range(5)]
    weights = [w for w, side in zip(weights, sides, strict=True) if side >= 11]
    value = 1.0
    for scale, weight in enumerate(weights):
        full, structure = [], []
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                x, y = (image[i : i + 11, j : j + 11] for image in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                both = (window * (x - mx) * (y - my)).sum()
                cs = (2 * both + 0.03**2) / (vx + vy + 0.03**2)
                structure.append(cs)
                full.append(cs * (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2))
        term = np.mean(full if scale == len(weights) - 1 else structure)
        value *= max(term, 0.0) ** (weight / sum(weights))
        height, width = (n // 2 * 2 for n in a.shape)
        a, b = (
            (x[:height:2, :width:2] + x[1:height:2, :width:2])
            + (x[:height:2, 1:width:2] + x[1:height:2, 1:width:2])
            for x in (a / 4, b / 4)
        )
    return value


@pytest.mark.parametrize(("shape", "scales"), [((44, 48), 3), ((23, 27), 2), ((12, 11), 1)])
def test_ms_ssim_against_a_slow_one(shape, scales):
    rng = np.random.default_rng(6)
    smooth = rng.random((3, *shape)).cumsum(1).cumsum(2)
    a = smooth / smooth.max((1, 2), keepdims=True)
    b = np.clip(a + np.array([0.05, 0.2, 1.0])[:, None, None] * rng.normal(size=a.shape), 0, 1)
    got = np.asarray(fidelity.ms_ssim(jnp.float32(a), jnp.float32(b)))
    assert fidelity.scales(min(shape)) == scales
    np.testing.assert_allclose(got, list(map(slow_ms_ssim, a, b)), atol=2e-5)
    assert 1 > got[0] > got[1] > got[2] >= 0
    same = fidelity.ms_ssim(jnp.float32(b), jnp.float32(b))
    np.testing.assert_allclose(np.asarray(same), 1, atol=1e-6)


def test_scales_of_ms_ssim_fit_the_image():
    assert [fidelity.scales(n) for n in (11, 22, 43, 44, 64, 176, 512)] == [1, 2, 2, 3, 3, 5, 5]
    with pytest.raises(ValueError, match="at least 11 x 11 are needed"):
        fidelity.ms_ssim(jnp.zeros((1, 10, 30)), jnp.zeros((1, 10, 30)))
