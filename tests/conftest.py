"""Every test sees 8 simulated CPU devices, checked shapes, and warnings as errors."""

import ctypes
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
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# Every module of the package, with an int wherever a float is asked for, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
install_import_hook("medsyn_jax", f"{__name__}.checked").__enter__()

import jax  # noqa: E402 (after the flags and the hook)

# The files that take a minute and more, the longest first, so that workers end at one time.
_SLOW = ("test_processes", "test_finetune_diffusion", "test_methods", "test_detect")
_SLOW += ("test_segment", "test_classify", "test_pretrain")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file goes to one worker, because its fixtures train models and its tests share programs."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(_SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True, scope="module")
def _returned_memory():
    """A worker gives its programs' memory back; glibc alone would keep gigabytes of it."""
    yield
    jax.clear_caches()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
