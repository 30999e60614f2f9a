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

# Each task is a module tasks/<name>.py with CHECKS, FREE and run(config, workdir).
TASKS = (
    "ingest",
    "pretrain",
    "classify",
    "segment",
    "detect",
    "ground",
    "zeroshot",
    "finetune_diffusion",
    "generate",
    "curate",
    "study",
)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment config, configs/NAME.py[:VARIANT].", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/<config>-<variant>."
)


def parse(argv: Sequence[str]) -> tuple[object, Path]:
    """(config, workdir) of a command line; UserError for a mistake in it."""
    _check_config_file(argv)
    try:
        _, *strays = flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"command line: {_reason(e)}") from None
    if strays:
        raise UserError(f"command line: {strays[0]!r} is no flag: use --flag=value")
    config = _CONFIG.value
    if config is None:
        raise UserError("command line: --config is missing: give --config configs/convirt.py")
    name, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    workdir = _WORKDIR.value or f"runs/{Path(name).stem}-{variant or 'demo'}"
    return config, Path(workdir)


def _reason(e: BaseException) -> str:
    """The mistake in the command line, in one line; raises `e` itself for a bug in a config."""
    while e.args and isinstance(e.args[0], BaseException):
        e = e.args[0]
    text = " ".join(str(e.args[0] if e.args else e).split())
    if "Traceback" in text:  # ml_collections passes the config file's traceback on as text
        _, mistake, variant = text.rpartition("ValueError: variant ")
        if not mistake:
            raise e
        return f"--config: variant {variant}"
    if isinstance(e, KeyError | AttributeError) and "get_config" not in text:
        return f"unknown config field {text.replace(' Did you', ': did you')}"
    text = re.sub(r"invalid literal for int.*", "must be a whole number", text)
    return re.sub(r"could not convert.*", "must be a number", text)


def _check_config_file(argv: Sequence[str]) -> None:
    """Raise UserError for a missing config file, for which absl would print a traceback."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config"):
            continue
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        path = Path(value.partition(":")[0])
        if not path.is_file() or path.suffix != ".py":
            what = "no Python file" if path.is_file() else "no such file"
            configs = sorted(str(p) for p in Path("configs").glob("*.py") if p.name != "common.py")
            choices = ", ".join(configs) or "none here"
            raise UserError(f"--config {value}: {what}: choose from {choices}")


def run(config, workdir: Path) -> None:
    """Set up JAX, check the config, and run its task."""
    if config.task not in TASKS:
        raise UserError(f"config.task: {config.task!r} is unknown: choose from {', '.join(TASKS)}")
    _prepare_jax(workdir)
    from medsyn_jax.core import checks, outputs

    task = importlib.import_module(f"medsyn_jax.tasks.{config.task}")
    checks.run(task.CHECKS, config)
    outputs.check_config(workdir, config, task.FREE, _overrides(config))
    task.run(config, workdir)


def _overrides(config) -> set[str]:
    """The config fields that the command line sets."""
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
    """Run a command line (default `sys.argv`) and return the exit status."""
    warnings.filterwarnings("ignore", module="tensorflow_datasets|orbax")
    logging.set_verbosity(logging.ERROR)  # users cannot act on the warnings of Orbax and TFDS
    argv = sys.argv if argv is None else argv
    if "--help" in argv:
        print(__doc__)
        return 0
    try:
        config, workdir = parse(argv)
        _make(workdir)
        run(config, workdir)
    except (UserError, MemoryError) as e:
        line = str(e)
        if isinstance(e, MemoryError):
            line = shortened(f"not enough memory ({e}): use smaller sizes or batches", 1000)
        print(f"error: {line}", file=sys.stderr, flush=True)
        return _leave(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return _leave(128 + signal.SIGINT)
    except Exception:
        _leave(1, traceback.format_exc())
        raise
    return 0


def _leave(status: int, message: str = "") -> int:
    """`status`; if this is one of several processes, it ends here with the message instead, because
    at a regular exit it would wait for the others."""
    if "jax" in sys.modules:  # not yet imported if the command line holds a mistake
        from medsyn_jax.core import mesh

        mesh.leave_at_once(status, message)
    return status


def _make(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"--workdir {workdir}: cannot be made ({e.strerror}): give another one"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
