"""The course of a fit in memory: its order, its limits, and the epoch that it keeps."""

import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.train import frozen, heads

SOURCE = frozen.Arrays(number=np.arange(10, dtype=np.int32))


def fitted(scores, rows, **changes):
    """The fit of a counter of steps by epochs of these scores, and the records of each step."""
    taken, scores = [], iter(scores)

    def step(state, batch, key):
        taken.append(np.asarray(batch["number"]).tolist())
        return state | {"params": state["params"] + 1}, {}

    settings = {"batch_size": 4, "epochs": 9, "steps": 1000, "patience": 2, "seed": 0} | changes
    state = {"params": jnp.zeros((), jnp.int32), "stats": {}}
    mesh = meshes.one_device()
    fit = heads.fit(step, state, lambda _: next(scores), SOURCE, rows, mesh, **settings)
    return fit, taken


def test_the_best_epoch_is_kept_and_patience_ends_the_fit():
    fit, taken = fitted([3.0, 1.0, 2.0, float("nan"), 0.0], np.arange(8))
    assert (int(fit.params), fit.score, fit.best_epoch, fit.epochs) == (4, 1.0, 2, 4)
    assert len(taken) == 8


def test_each_epoch_takes_all_its_records_anew_and_fills_up_the_last_batch():
    rows = np.array([1, 3, 5, 7, 8, 9])
    _, taken = fitted([2.0, 1.0], rows, epochs=2)
    for epoch in (taken[:2], taken[2:]):
        order = [*epoch[0], *epoch[1]]
        assert sorted(order[:6]) == rows.tolist()
        assert order[6:] == order[:2]
    assert taken[:2] != taken[2:]
    assert fitted([2.0, 1.0], rows, epochs=2)[1] == taken
    assert fitted([2.0, 1.0], rows, epochs=2, seed=1)[1] != taken


def test_fewer_records_than_a_batch_are_repeated():
    _, taken = fitted([1.0], np.array([2, 6]), epochs=1)
    assert [sorted(batch) for batch in taken] == [[2, 2, 6, 6]]


def test_a_fit_ends_with_the_epoch_of_its_last_step():
    fit, taken = fitted([3.0, 2.0, 1.0], np.arange(8), steps=3)
    assert (fit.epochs, len(taken)) == (2, 4)


def test_a_fit_without_a_finite_score_is_refused():
    with pytest.raises(UserError, match=r"config.fit.learning_rate: the fit of seed 3 diverged"):
        fitted([float("nan")] * 2, np.arange(8), where=" of seed 3")


def test_threads_read_the_same_batches():
    several = fitted([2.0, 1.0], np.arange(8), threads=2, epochs=2)[1]
    assert several == fitted([2.0, 1.0], np.arange(8), epochs=2)[1]
