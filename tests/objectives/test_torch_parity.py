"""That the torch side of the benches computes the same losses."""

import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.objectives import gloria, mgca

torch = pytest.importorskip("torch")

from scripts import torch_methods  # noqa: E402

pytestmark = pytest.mark.parity


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_local_loss():
    rng, counts = np.random.default_rng(0), [6, 1, 4, 3, 2]
    regions = (rng.normal(size=(5, 9, 16)) / 2).astype(np.float32)
    words = (rng.normal(size=(5, 6, 16)) / 2).astype(np.float32)
    theirs = torch_methods.local_loss(
        torch.from_numpy(regions).mT, torch.from_numpy(words).mT, counts
    )
    mask = np.arange(6) < np.array(counts)[:, None]
    ours, _ = gloria.local_loss(jnp.asarray(regions), jnp.asarray(words), jnp.asarray(mask))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_token_and_prototype_losses():
    rng = np.random.default_rng(0)
    words, regions = unit(rng.normal(size=(4, 6, 8))), unit(rng.normal(size=(4, 9, 8)))
    image, report = unit(rng.normal(size=(2, 4, 8)))
    prototypes = unit(rng.normal(size=(7, 8)))
    real = np.arange(6) < np.array([6, 1, 4, 3])[:, None]
    looks = rng.uniform(size=(4, 6)).astype(np.float32) * real
    of_word = looks / looks.sum(1, keepdims=True)
    of_region = np.full((4, 9), 1 / 9, np.float32)
    arrays = words, regions, real, of_word, of_region
    theirs = torch_methods.token_loss(*map(torch.from_numpy, arrays))
    ours = sum(mgca.token_loss(*map(jnp.asarray, arrays)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    scores = (torch.from_numpy(x @ prototypes.T) for x in (image, report))
    theirs = torch_methods.prototype_loss(*scores)
    ours = mgca.prototype_loss(*map(jnp.asarray, (image, report, prototypes)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
