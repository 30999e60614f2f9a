"""Files of a run: config.json, metrics.jsonl, TensorBoard events and results.json.

Only the first process writes. Files are replaced as a whole or appended to.
"""

import json
import math
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from rich.progress import TextColumn

from medsyn_jax.core import log
from medsyn_jax.core.errors import UserError, shortened
from medsyn_jax.core.files import full_disk_is_user_error, write_text

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, with null for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """`value` with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(
    workdir: Path,
    task: str,
    metrics: Mapping[str, Mapping[str, Any]],
    shown: Collection[str] | None = None,
) -> None:
    """Write results.json, and print its figures on stdout, a line each.

    Args:
        workdir: of the run.
        task: its name.
        metrics: name -> {"value": v}, for an estimate with "n" and "ci95" [low, high], and with
            figures to compare with: "chance", "prior", "ceiling". None is undefined.
        shown: names of the figures that are printed (default all).
    """
    if jax.process_index():
        return
    write_json(workdir / "results.json", {"task": task, "metrics": dict(metrics)})
    lines = {name: m for name, m in metrics.items() if shown is None or name in shown}
    width = max((len(name) for name in lines), default=0)
    for name, m in lines.items():
        interval = f"  [{', '.join(map(log.number, m['ci95']))}]" if m.get("ci95") else ""
        counts = "".join(f"  {k}={m[k]}" for k in ("n", "positives", "labels") if k in m)
        controls = [k for k in ("chance", "prior", "ceiling") if k in m]
        compared = "".join(f"  {k} {log.number(m[k])}" for k in controls)
        print(f"{name:<{width}}  {log.number(m.get('value'))}{interval}{counts}{compared}")
    print(shortened(f"results: {workdir / 'results.json'}", 1000), flush=True)


def check_config(
    workdir: Path, config: Any, free: Sequence[str] = (), overrides: Collection[str] = ()
) -> None:
    """Compare `config` with the config.json of the workdir, if there is one.

    A field that the package has gained since then takes its default, and one that it has lost is
    ignored; both are reported.

    Args:
        workdir: of the run.
        config: the effective config of this start.
        free: prefixes of fields that may differ between starts of one run (devices, threads).
        overrides: fields set on the command line; a new field among them is refused.

    Raises:
        UserError: for any other difference, or a config.json of another program.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        old = flat({**json.loads(path.read_text())["config"]})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a config written by medsyn_jax: move it away") from None
    new = flat(json.loads(config.to_json()))
    changed, lost, gained = [], [], []
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) == new.get(field) or field.startswith(tuple(free)):
            continue
        if (field in old and field in new) or field in overrides:
            changed.append(f"{field} {old.get(field)!r} -> {new.get(field)!r}")
        elif field in old:
            lost.append(field)
        else:
            gained.append(f"{field}={new[field]!r}")
    if changed:
        raise UserError(
            f"{workdir} was made with another config ({', '.join(changed[:3])}): "
            "give another --workdir, or the same values to resume"
        )
    for verb, names in (("has no effect any more", lost), ("is new and takes its default", gained)):
        if names:
            shown = shortened(", ".join(names), 300)
            log.say(f"{workdir} was made by another version of medsyn_jax: {shown} {verb}")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Full field name -> value of nested dicts; an empty section has no fields."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for key, sub in value.items()
        for k, v in flat(sub, f"{prefix}.{key}" if prefix else key).items()
    }


def write_config(workdir: Path, config: Any) -> None:
    """Write config.json: the effective config, versions of packages and the git commit.

    Call this after all other checks, so that a failed start does not bind the workdir.
    """
    if jax.process_index() == 0:
        versions = {name: metadata.version(name) for name in PACKAGES}
        written = {"config": json.loads(config.to_json()), "versions": versions}
        write_json(workdir / "config.json", written | {"commit": _git_commit()})


def _git_commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


class MetricsLog:
    """metrics.jsonl and TensorBoard events of a training, and its progress with rate and loss.

    Progress is a bar on a terminal, elsewhere a line about every `every_s` seconds.

    Args:
        workdir: of the run.
        step: of the (re)start. Later lines of an earlier attempt are dropped: they come again.
        steps: of the whole training.
        records: trained on in one step.
        every_s: seconds between two readings of the rate.
    """

    def __init__(self, workdir: Path, step: int, steps: int, records: int, every_s: float = 10.0):
        self.main = jax.process_index() == 0
        self.steps, self.records, self.every_s = steps, records, every_s
        self._shown_step, self._shown_at = step, time.monotonic()
        self._rate: float | None = None
        if not self.main:
            return
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        self._drop_after(step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self._bar = log.progress_bar(
            TextColumn("step {task.completed}/{task.total}  {task.fields[text]}")
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, text="")
        self._bar.start()

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a kill
        write_text(self._path, "".join(kept))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl and a TensorBoard point for each finite metric."""
        if not self.main:
            return
        with full_disk_is_user_error(self._path), self._path.open("a") as file:
            file.write(json.dumps(_finite({"step": step, **metrics}), allow_nan=False) + "\n")
        for name, value in metrics.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def progress(self, step: int, loss: float) -> float | None:
        """Show step, loss and rate when due; the latest rate in images/s, None before the first."""
        now = time.monotonic()
        if not self.main or (now - self._shown_at < self.every_s and step < self.steps):
            return self._rate
        rate = (step - self._shown_step) * self.records / max(now - self._shown_at, 1e-9)
        self._shown_step, self._shown_at, self._rate = step, now, rate
        text = f"loss {loss:.4f}  {rate:.1f} images/s"
        self._bar.update(self._task, completed=step, text=text)
        if not log.console.is_terminal:
            log.console.print(f"step {step}/{self.steps}  {text}")
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block (evaluation, saving) out of the rate."""
        start = time.monotonic()
        yield
        self._shown_at += time.monotonic() - start

    def close(self) -> None:
        """Stop the bar and close the event file."""
        if self.main:
            self._bar.stop()
            self._board.close()
