"""From sections of a config to steps."""

from types import SimpleNamespace

import pytest

from medsyn_jax.core.errors import UserError
from medsyn_jax.train import run


def section(**changes):
    usual = {"epochs": 8.0, "evals_per_epoch": 1.0, "checkpoints_per_epoch": 2.0}
    return SimpleNamespace(**usual | {"steps": 0, "log_every": 10, "patience": 5} | changes)


def test_a_run_of_few_steps_says_so(capsys):
    assert run.make_plan(section(), 182, 64).steps == 16
    assert capsys.readouterr().err.startswith(
        "only 16 training steps (8 epochs of 182 records by 64)"
    )
    assert run.make_plan(section(), 4014, 64).steps == 496  # the demo
    assert capsys.readouterr().err == ""


def test_steps_are_what_devices_can_count():
    plan = run.make_plan(section(evals_per_epoch=1e-37, checkpoints_per_epoch=3e38), 4014, 64)
    assert (plan.eval_every, plan.checkpoint_every) == (2**31 - 1, 1)
    with pytest.raises(UserError, match=r"config.train.epochs: 1e\+30: is more than 2147483647"):
        run.make_plan(section(epochs=1e30), 4014, 64)
