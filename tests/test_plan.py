"""What the planner for TPUs says where a program cannot be compiled."""

import os
import sys

import jax
import pytest

from tpu import plan


@pytest.fixture
def planned(monkeypatch):
    """Runs the command line with another compiler for the local loss."""
    monkeypatch.setenv("MEDSYN_KERNELS", "auto")

    def run(act, *more):
        monkeypatch.setattr(plan, "local_loss", act)
        monkeypatch.setattr(sys, "argv", ["plan", "--what", "local", "--chip", "v3", *more])
        plan.main()

    return run


def _fails(error):
    def act(chip, batch):
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM\n(139.19G)"),
            "error: --batch 4: too big for a v3: lower it (RESOURCE_EXHAUSTED: Ran out of memory "
            "on HBM (139.19G))",
        ),
        (
            RuntimeError("JAX TPU support not installed"),
            "error: no TPU compiler here: pip install -e '.[tpu]'",
        ),
    ],
)
def test_a_program_that_cannot_be_planned_is_one_line(planned, error, says):
    with pytest.raises(SystemExit) as ended:
        planned(_fails(error), "--batch", "4")
    assert ended.value.code == says


@pytest.mark.parametrize("flags", [("--batch", "0"), ("--size", "100"), ("--chip", "v9")])
def test_a_wrong_flag_is_told(planned, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        planned(_fails(AssertionError()), *flags)
    assert f"argument {flags[0]}: " in capsys.readouterr().err


def test_a_kernel_that_the_compiler_refuses_is_left_to_xla(planned, capsys):
    """Once: what fails by XLA's own operations, too, is a bug and keeps its traceback."""
    asked = []

    def act(chip, batch):
        asked.append(os.environ["MEDSYN_KERNELS"])
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel")

    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic"):
        planned(act)
    assert asked == ["auto", "xla"]
    assert capsys.readouterr().err.startswith("v3: XLA's own operations for kernels (INTERNAL")
