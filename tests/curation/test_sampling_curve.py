"""How settings of a sampler are compared: `scripts/sampling_curve.py`."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.train.probe import Probe
from scripts import sampling_curve


@pytest.fixture(scope="module")
def held():
    """40 reports of 20 subjects, and a probe that reads its label off the first feature."""
    rng = np.random.default_rng(0)
    real, train = rng.normal(size=(2, 40, 6)).astype(np.float32)
    labels = (real[:, :1] > 0).astype(np.int8)
    nothing = jnp.zeros((1,))
    fitted = Probe(jnp.eye(6)[None, :, :1], jnp.zeros((1, 1)), nothing, nothing, nothing)
    texts, subjects = [""] * 40, np.arange(40) // 2
    return sampling_curve.Held(texts, real, train, labels, ["a"], subjects, fitted)


def test_differences_are_paired(held):
    """Another setting whose images are almost the same differs far less than either varies."""
    noise = np.random.default_rng(1).normal(size=held.real.shape).astype(np.float32)
    reference, other = (held.judge(x) for x in (held.real + noise, held.real + 1.02 * noise))
    same = held.judge(held.real + noise).entries(reference)
    found = other.entries(reference)
    for name in ("frechet", "auroc"):
        assert (same[f"{name}_difference"], same[f"{name}_difference_ci95"]) == (0, [0, 0])
        low, high = found[f"{name}_difference_ci95"]
        assert low <= found[f"{name}_difference"] <= high
    assert found["frechet_difference_ci95"][0] > 0
    draws = other.frechet_draws
    assert np.ptp(found["frechet_difference_ci95"]) < 0.2 * np.ptp(
        np.percentile(draws, [2.5, 97.5])
    )
    assert held.judge_real().entries(reference).keys() == found.keys() - {
        "frechet_difference",
        "frechet_difference_ci95",
    }


def test_the_table_has_a_line_for_each_setting():
    chosen = sampling_curve.settings(3.0)
    assert len({dataclasses.astuple(c) for c in chosen}) == len(chosen)
    rows = [{"sampler": sampling_curve._sampler(c), "gflop": 2.0, "share": 0.5} for c in chosen]
    rows[1] |= {"auroc_difference": 0.0123, "auroc_difference_ci95": [-0.01, 0.0266]}
    json.dumps(rows, allow_nan=False)  # JSON has no infinity
    head, _, *lines = sampling_curve.table([*rows, {"sampler": "real"}]).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert len(set(names)) == len(chosen) + 1
    assert names[0] == "pndm 75, guidance 3"
    assert "dpm++2m 20, guidance 3 where 0.3 < sigma <= 5, cache 2" in names
    assert {"dpm++2m 20, guidance 3 where sigma <= 5", "dpm++2m 20, guidance 1, cache 2"} <= {
        *names
    }
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert "| +0.012 [-0.010, +0.027] |" in lines[1]
