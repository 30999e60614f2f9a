"""`python -m medsyn_jax.main --config configs/convirt.py[:VARIANT] [--workdir DIR]
[--config.FIELD=VALUE ...]`: one task, one workdir."""

import importlib
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from medsyn_jax.core.errors import UserError, shortened

# Each is tasks/<name>.py with CHECKS, FREE and run(config, workdir).
TASKS = ("ingest", "pretrain", "classify", "finetune_diffusion", "generate", "curate", "ground")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment config, configs/NAME.py[:VARIANT].", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept; default runs/<config>-<variant>."
)


def parse(argv: Sequence[str]) -> tuple[object, Path]:
    """(config, workdir) out of the command line; UserError for whatever cannot be understood."""
    _check_file(argv)
    try:
        rest = flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"command line: {_reason(e)}") from None
    if rest[1:]:
        raise UserError(f"command line: {rest[1]!r} is no flag: use --flag=value")
    config = _CONFIG.value
    if config is None:
        raise UserError("command line: --config is missing: give --config configs/convirt.py")
    name, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    workdir = _WORKDIR.value or f"runs/{Path(name).stem}-{variant or 'demo'}"
    return config, Path(workdir)


def _reason(e: BaseException) -> str:
    """What was wrong with the command line, in one line; raises `e` itself if a config is buggy."""
    while e.args and isinstance(e.args[0], BaseException):
        e = e.args[0]
    text = " ".join(str(e.args[0] if e.args else e).split())
    if "Traceback" in text:  # of the config file, which ml_collections hands on as text
        _, found, variant = text.rpartition("ValueError: variant ")
        if not found:
            raise e
        return f"--config: variant {variant}"
    if isinstance(e, KeyError | AttributeError) and "get_config" not in text:
        return f"unknown config field {text.replace(' Did you', ': did you')}"
    for kind, python in (
        ("whole number", "invalid literal for int"),
        ("number", "could not convert"),
    ):
        text = re.sub(rf"{python}.*", f"must be a {kind}", text)
    return text


def _check_file(argv: Sequence[str]) -> None:
    """A config file that is not there, or is none, before absl turns it into a traceback."""
    for i, argument in enumerate(argv):
        if argument in ("--config", "-config"):
            value = argv[i + 1] if i + 1 < len(argv) else ""
        elif argument.startswith("--config="):
            value = argument.removeprefix("--config=")
        else:
            continue
        path = Path(value.partition(":")[0])
        if not path.is_file() or path.suffix != ".py":
            what = "no Python file" if path.is_file() else "no such file"
            found = sorted(str(p) for p in Path("configs").glob("*.py") if p.name != "common.py")
            there = ", ".join(found) or "none here"
            raise UserError(f"--config {value}: {what}: choose from {there}")


def run(config, workdir: Path) -> None:
    """Set JAX up, check the config, and hand over to the task."""
    if config.task not in TASKS:
        raise UserError(f"config.task: {config.task!r} is unknown: choose from {', '.join(TASKS)}")
    _prepare_jax(workdir)
    from medsyn_jax.core import checks, outputs

    task = importlib.import_module(f"medsyn_jax.tasks.{config.task}")
    checks.run(task.CHECKS, config)
    outputs.check_config(workdir, config, task.FREE, _overrides(config))
    task.run(config, workdir)


def _overrides(config) -> set[str]:
    """The fields that the command line sets."""
    flag = flags.FLAGS["config"]
    if not flags.FLAGS.is_parsed() or flag.value is not config:
        return set()
    return set(config_flags.get_override_values(flag))


def _prepare_jax(workdir: Path) -> None:
    import jax

    from medsyn_jax.core import mesh

    cache = Path(
        os.environ.get("JAX_COMPILATION_CACHE_DIR", workdir.absolute().parent / ".jax_cache")
    )
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    mesh.initialize()


def main(argv: Sequence[str] | None = None) -> int:
    warnings.filterwarnings("ignore", module="tensorflow_datasets|orbax")
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS warn of what users cannot change
    argv = sys.argv if argv is None else argv
    if "--help" in argv:
        print(__doc__)
        return 0
    try:
        config, workdir = parse(argv)
        _make(workdir)
        run(config, workdir)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        _leave_others(2)
        return 2
    except MemoryError as e:
        line = shortened(f"not enough memory ({e}): use smaller sizes or batches", 1000)
        print(f"error: {line}", file=sys.stderr, flush=True)
        _leave_others(2)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        _leave_others(128 + signal.SIGINT)
        return 128 + signal.SIGINT
    except Exception:
        _leave_others(1, traceback.format_exc())
        raise
    return 0


def _leave_others(status: int, said: str = "") -> None:
    """Leave at once, with what Python would print at a regular exit, if others wait for this
    process."""
    if "jax" in sys.modules:  # a mistake in the command is told without importing it
        from medsyn_jax.core import mesh

        mesh.leave_at_once(status, said)


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"--workdir {workdir}: cannot be made ({e.strerror}): give another one"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
