"""What a run leaves in its workdir besides checkpoints: config.json, metrics.jsonl, TensorBoard
events and results.json. Only the first process writes; every file is replaced whole or appended to.
"""

import errno
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medsyn_jax.core.errors import UserError, shortened
from medsyn_jax.core.files import replaced

_STARTED = time.monotonic()
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")
# Paths and names are shown as they are: no [markup], no :emoji: in them.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """One line on the terminal (stderr), from the first process only."""
    if jax.process_index() == 0:
        console.print(text, soft_wrap=True)  # a log is no place for line breaks


def say_cost(what: str) -> None:
    """One line with the time since the program started and its peak host memory so far, without
    that of the processes that it started (ingestion's workers)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mib = peak / (2**20 if sys.platform == "darwin" else 2**10)
    cost = f"{time.monotonic() - _STARTED:.1f} s; peak host memory {mib:.0f} MiB (this process)"
    say(f"{what} after {cost}")


class ImagesBar:
    """Progress in images: a bar on a terminal, elsewhere a plain line about every 10 seconds.

    what: is being done. total: images. done: those from before, which the rate leaves out.
    """

    def __init__(self, what: str, total: int, done: int, every_s: float = 10.0):
        self.what, self.total, self.first, self.shown = what, total, done, done
        self.every_s, self.began = every_s, time.monotonic()
        self.last = self.began
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} images/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or jax.process_index() > 0,
        )
        self.task = self.bar.add_task(what, total=total, completed=done, rate=0.0)

    def __enter__(self) -> "ImagesBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int) -> None:
        """Tell that `done` of the images are there."""
        now = time.monotonic()
        rate = (done - self.first) / max(now - self.began, 1e-9)
        self.bar.update(self.task, completed=done, rate=rate)
        due = now - self.last > self.every_s or done == self.total
        if due and done != self.shown and not console.is_terminal:
            self.last, self.shown = now, done
            left = (self.total - done) / max(rate, 1e-9)
            say(f"{self.what}: {done}/{self.total} images, {rate:.1f} images/s, {left:.0f} s left")


@contextmanager
def full_disk_is_user_error(where: Path | str) -> Iterator[None]:
    """Turn "no space left" into one line; whatever was complete before stays as it is."""
    try:
        yield
    except Exception as e:  # TensorStore, below Orbax, has the number in the text of a ValueError
        codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        said = any(f"os_error_code='{code}'" in str(e) for code in codes)
        if said or (isinstance(e, OSError) and e.errno in codes):
            raise UserError(
                f"disk full: {where}: free some space and run the same command again; "
                "everything that was complete has been kept"
            ) from e
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that readers see the old file or the new one, never a part. What no number
    is (NaN, infinity) becomes null: JSON has neither."""
    with full_disk_is_user_error(path), replaced(path) as temporary:
        temporary.write_text(json.dumps(_strict(value), indent=2, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


UNDEFINED = "undefined"


def number(value: float | None, form: str = ".4g") -> str:
    """A figure as people read it; `UNDEFINED` for None, NaN and infinity."""
    return format(value, form) if value is not None and math.isfinite(value) else UNDEFINED


def write_results(
    workdir: Path,
    task: str,
    metrics: Mapping[str, Mapping[str, Any]],
    shown: Collection[str] | None = None,
) -> None:
    """results.json, and the same figures as lines on the terminal.

    metrics: name -> {"value": v} plus "n" and "ci95" [low, high] where it is an estimate, and what
    to compare it with: "chance", "prior", "ceiling"; None where one is undefined. shown: the names
    of those that get a line (default all).
    """
    if jax.process_index():
        return
    write_json(workdir / "results.json", {"task": task, "metrics": dict(metrics)})
    lines = {name: m for name, m in metrics.items() if shown is None or name in shown}
    width = max((len(name) for name in lines), default=0)
    for name, m in lines.items():
        interval = f"  [{', '.join(map(number, m['ci95']))}]" if m.get("ci95") else ""
        count = "".join(f"  {k}={m[k]}" for k in ("n", "positives", "labels") if k in m)
        beside = "".join(f"  {k} {number(m[k])}" for k in ("chance", "prior", "ceiling") if k in m)
        print(f"{name:<{width}}  {number(m.get('value'))}{interval}{count}{beside}")
    print(shortened(f"results: {workdir / 'results.json'}", 1000), flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of text below `head`, on the terminal, from the first process only; the first column to
    the left, the others to the right."""
    if jax.process_index():
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join((first.ljust(widths[0]), *cells)))


def _git_commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Full names of fields -> values; an empty section has none."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for key, sub in value.items()
        for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()
    }


def check_config(
    workdir: Path, config: Any, free: Sequence[str] = (), overrides: Collection[str] = ()
) -> None:
    """Compare `config` with the config that the workdir was made with, if there is one.

    A field that the package has got or lost since then takes its default: it is said, not refused.

    Args:
        workdir: of the run.
        config: the effective config of this start.
        free: prefixes of fields that may differ between starts of one run (devices, threads).
        overrides: fields that the command line sets; a new field among them is refused.

    Raises:
        UserError: if another field differs from what the workdir was made with.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        old = _flat({**json.loads(path.read_text())["config"]})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a config written by medsyn_jax: move it away") from None
    new = _flat(json.loads(config.to_json()))
    different = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    different = [k for k in different if not k.startswith(tuple(free))]
    later = [k for k in different if (k in new) != (k in old) and k not in overrides]
    if changed := [k for k in different if k not in later]:
        shown = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:3])
        raise UserError(
            f"{workdir} was made with another config ({shown}): "
            "give another --workdir, or the same values to resume"
        )
    for verb, names in (
        ("has no effect any more", [k for k in later if k in old]),
        ("is new and takes its default", [f"{k}={new[k]!r}" for k in later if k in new]),
    ):
        if names:
            shown = shortened(", ".join(names), 300)
            say(f"{workdir} was made by another version of medsyn_jax: {shown} {verb}")


def write_config(workdir: Path, config: Any) -> None:
    """config.json: the effective config, versions and commit.

    To be called when everything else has been checked, so that a start that failed binds nobody.
    """
    if jax.process_index() == 0:
        versions = {name: metadata.version(name) for name in PACKAGES}
        written = {"config": json.loads(config.to_json()), "versions": versions}
        write_json(workdir / "config.json", written | {"commit": _git_commit()})


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard, and shows progress with rate and loss.

    On a terminal that is a bar; elsewhere one plain line about every `every_s` seconds.
    """

    def __init__(self, workdir: Path, step: int, steps: int, records: int, every_s: float = 10.0):
        """step: where the run (re)starts: later lines of an earlier attempt are dropped, since
        they will be written again. records: how many records one step trains on."""
        self.main = jax.process_index() == 0
        self.steps, self.records, self.every_s = steps, records, every_s
        self._shown_step, self._shown_at = step, time.monotonic()
        self._rate: float | None = None
        if not self.main:
            return
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        self._forget_after(step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed}/{task.total}  {task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, text="")
        self._bar.start()

    def _forget_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line that a kill cut short
        with full_disk_is_user_error(self._path), replaced(self._path) as temporary:
            temporary.write_text("".join(kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one TensorBoard point a metric."""
        if not self.main:
            return
        with full_disk_is_user_error(self._path), self._path.open("a") as file:
            file.write(json.dumps(_strict({"step": step, **metrics}), allow_nan=False) + "\n")
        for name, value in metrics.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, loss: float) -> float | None:
        """Show where the run is, when it is time for that; returns the latest reading of
        images/s, None before the first."""
        now = time.monotonic()
        if not self.main or (now - self._shown_at < self.every_s and step < self.steps):
            return self._rate
        rate = (step - self._shown_step) * self.records / max(now - self._shown_at, 1e-9)
        self._shown_step, self._shown_at, self._rate = step, now, rate
        text = f"loss {loss:.4f}  {rate:.1f} images/s"
        self._bar.update(self._task, completed=step, text=text)
        if not console.is_terminal:
            console.print(f"step {step}/{self.steps}  {text}")
        return rate

    def pause(self) -> None:
        """Leave time that was not spent on training (evaluation, saving) out of the next rate."""
        self._paused_at = time.monotonic()

    def resume(self) -> None:
        self._shown_at += time.monotonic() - self._paused_at

    def close(self) -> None:
        if self.main:
            self._bar.stop()
            self._board.close()
