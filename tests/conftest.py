"""Every test sees 8 simulated CPU devices, checked shapes, and warnings as errors."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the suite's time is compilation of programs that run once: compile them lightly.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "/tmp/medsyn_jax_test_cache")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

_hook = install_import_hook(
    [
        "medsyn_jax.models",
        "medsyn_jax.objectives",
        "medsyn_jax.diffusion",
        "medsyn_jax.data.images.transforms",
        "medsyn_jax.train.encoders",
        "medsyn_jax.train.logistic",
        "medsyn_jax.train.probe",
    ],
    "beartype.beartype",
)
_hook.__enter__()

import jax  # noqa: E402 (after the flags and the hook)


@pytest.fixture(autouse=True)
def _strict():
    """No silent rank or dtype promotion in any test."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real radiographs beside the checkout; tests that need it skip without it."""
    from pathlib import Path

    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the trial data are not at {folder}")
    return folder
