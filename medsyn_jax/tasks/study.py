"""The study: pre-train on every arm, run every downstream task on each encoder, make the table.

A study is a plan of commands that a user could type: each is a run of another task in a workdir
below WORKDIR/runs, and resumes as that task does. A cell is one figure of the table, (arm, method,
task, fraction, seed), and one file in WORKDIR/cells, written when its command has ended. A finished
command is never run again; the table depends on the cells alone.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax

from medsyn_jax.core import checks, log, outputs
from medsyn_jax.core.errors import UserError, shortened
from medsyn_jax.core.files import replaced
from medsyn_jax.data.store import shards
from medsyn_jax.tables import cells as tables
from medsyn_jax.tables import examples, report
from medsyn_jax.tables.cells import Cell

FREE = ("cells", "workers", "configs")
ARMS = ("real", "synthetic", "mixed", "synthetic_then_real", "duplicated")


@dataclass(frozen=True)
class Command:
    """A run of a task: its workdir below WORKDIR/runs, its config file, flags and prerequisites."""

    name: str
    config: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()


class Commands:
    """The commands of a study by name, each after its prerequisites."""

    def __init__(self, config: Any, workdir: Path):
        self.config, self.runs, self.by_name = config, workdir / "runs", dict[str, Command]()

    def _add(
        self, name: str, config: str, flags: Mapping[str, Any], needs: Sequence[str], kind: str
    ) -> str:
        own = [f"--config.{flag}" for flag in self.config.flags[kind]]
        texts = [f"--config.{k}={v if isinstance(v, str) else repr(v)}" for k, v in flags.items()]
        needs = tuple(need for need in needs if need)
        self.by_name.setdefault(name, Command(name, config, (*own, *texts), needs))
        return name

    def folder(self, which: str) -> Path:
        """The shards of "real" or "synthetic" data."""
        return Path(self.config[which] or self.runs / which / "shards")

    def data(self, which: str) -> tuple[str, str]:
        """The folder of shards of "real" or "synthetic" data, and the command that makes it ("" for
        a folder that the config names)."""
        folder = str(self.folder(which))
        if self.config[which]:
            return folder, ""
        if which == "real":
            return folder, self._add(which, "ingest", {}, (), "ingest")
        real, needs = self.data("real")
        return folder, self._add(which, "generate", {"data.source": real}, [needs], "generate")

    def pretraining(self, method: str, arm: str, seed: int) -> str:
        """The command whose workdir holds the encoder of an arm."""
        if arm == "synthetic_then_real":
            return self._second(method, seed)
        which = {"mixed": ("real", "synthetic"), "duplicated": ("real", "real")}.get(arm, (arm,))
        return self._pretrain(f"{method}_{arm}_seed{seed}", method, which, seed, self.config.steps)

    def _second(self, method: str, seed: int) -> str:
        """Half of the steps on synthetic data, then the encoders go on on real data."""
        half = self.config.steps // 2
        first = f"{method}_synthetic_half_seed{seed}"
        first = self._pretrain(first, method, ("synthetic",), seed, half)
        encoders = self.runs / first / "encoders"
        layout = "torchvision" if _image_kind(self.config) == "resnet" else "timm_vit"
        start = {
            "image.weights": str(encoders / "image.safetensors"),
            "image.layout": layout,
            "text.weights": str(encoders / "text.safetensors"),
            "text.layout": "hf_bert",
            "data.tokenizer": str(self.runs / first / "tokenizer"),
        }
        name = f"{method}_synthetic_then_real_seed{seed}"
        steps = self.config.steps - half
        return self._pretrain(name, method, ("real",), seed, steps, start, [first])

    def _pretrain(
        self,
        name: str,
        method: str,
        which: Sequence[str],
        seed: int,
        steps: int,
        start: Mapping[str, Any] | None = None,
        needs: Sequence[str] = (),
    ) -> str:
        folders, makers = zip(*map(self.data, which), strict=True)
        flags = {
            "data.sources": folders,
            "data.weights": (1.0,) * len(folders),
            "seed": seed,
            "train.steps": steps,  # the same in every arm, as is the number of evaluations
            "train.evals_per_epoch": float(len(folders)),
            "train.checkpoints_per_epoch": float(len(folders)),
            "train.patience": 0,
        }
        needs = (*makers, *needs)
        return self._add(name, method, flags | dict(start or {}), needs, "pretrain")

    def downstream(self, encoder: str, task: str, seed: int, starts: bool) -> str:
        """The command that runs a task on an encoder, at all fractions of the labels.

        starts: whether the same run uses the architecture untrained and with ImageNet's weights.
        """
        folder, maker = self.data("real")
        flags = {
            "encoder.workdir": str(self.runs / encoder),
            "fractions": tuple(self.config.fractions),
            "seed": seed,
            "seeds": 1,
            self.config.tasks[task].untrained: int(starts),
        }
        if self.config.variant != "paper":  # whose configs name their own data sets
            flags["data.source"] = folder
        if starts and self.config.imagenet:
            flags["encoder.weights"] = self.config.imagenet
        return self._add(f"{encoder}_{task}", task, flags, [maker, encoder], task)


def run(config: Any, workdir: Path) -> None:
    """Run the commands of the cells that `config.cells` names, and make the table of all cells.

    Writes cells/NAME.json, table.md, table.tex, table.csv, report.html and results.json. Raises
    UserError at the end if a command failed; the others are run nevertheless.
    """
    jax.config.update("jax_platforms", "cpu")  # leave the accelerators to the commands
    commands = Commands(config, workdir)
    cells = plan(config, commands)
    wanted = {cell: name for cell, name in cells.items() if fnmatchcase(cell.name, config.cells)}
    if config.cells and not wanted:
        names = ", ".join(cell.name for cell in list(cells)[:3])
        raise UserError(f"config.cells: {config.cells!r}: names no cell; there are {names}, ...")
    outputs.write_config(workdir, config)
    (workdir / "cells.txt").write_text("".join(f"{cell.name}\n" for cell in cells))
    missing = {c: n for c, n in wanted.items() if not _path(workdir, c).exists()}
    log.say(f"{len(wanted)} cells of {len(cells)}, {len(wanted) - len(missing)} are finished")

    def finished(name: str) -> None:
        for cell in (cell for cell, command in missing.items() if command == name):
            _write_cell(workdir, cell, commands, name)

    runner = _Runner(config, workdir, commands.by_name)
    failures = runner.run(set(missing.values()), finished)
    entries = tables.read(workdir / "cells", cells)
    if not config.cells and not entries:
        log.say(f"{workdir / 'cells.txt'} lists the cells; none is finished, so there is no table")
        return
    pairs = _pairs(workdir, commands)
    results = report.write(workdir, entries, tuple(config.tasks), len(cells), pairs)
    outputs.write_results(workdir, "study", results, shown=())
    if failures:
        lines = [f"{name}: {reason}" for name, reason in failures.items()]
        raise UserError(
            f"{len(failures)} of {len(commands.by_name)} commands failed (the table has the other "
            f"cells): {shortened('; '.join(lines), 600)}: see {workdir / 'logs'}"
        )


def _check_arms(config: Any) -> None:
    for method, arms in config.arms.items():
        checks.choices(f"arms.{method}", ARMS)(config)
        if not arms:
            raise UserError(f"config.arms.{method}: is empty: choose from {', '.join(ARMS)}")
    if not config.arms or not config.tasks:
        raise UserError("config.arms, config.tasks: give at least one method and one task")


def _check_flags(config: Any) -> None:
    for name, flags in config.flags.items():
        checks.texts("flags", name)(config)
        for flag in flags:
            if "=" not in flag:
                raise UserError(f"config.flags.{name}: {flag!r}: give FIELD=VALUE")


def _check_configs(config: Any) -> None:
    names = ("ingest", "generate", *config.arms, *config.tasks)
    for name in names:
        path = Path(config.configs, f"{name}.py")
        if not path.is_file():
            raise UserError(f"config.configs: {path}: no such file: start from the repository root")


CHECKS = (
    checks.numbers("count", "", "steps seeds"),
    checks.numbers("part", "", "fractions"),
    checks.numbers("from 0", "", "workers"),
    _check_arms,
    _check_flags,
    _check_configs,
    checks.files(lambda config: {name: config[name] for name in ("real", "synthetic", "imagenet")}),
)


def plan(config: Any, commands: Commands) -> dict[Cell, str]:
    """The cells of a study in the order of its table, each with the command that makes it."""
    cells: dict[Cell, str] = {}
    starts = ["random", "imagenet"] if config.imagenet else ["random"]
    first = next((method, arms[0]) for method, arms in config.arms.items())
    for seed in range(config.seeds):
        arms = [("none", start, first) for start in starts]
        arms += [(m, arm, (m, arm)) for m, arms in config.arms.items() for arm in arms]
        for label, arm, trained in arms:
            encoder = commands.pretraining(*trained, seed)
            for task in config.tasks:
                name = commands.downstream(encoder, task, seed, starts=trained == first)
                for fraction in config.fractions:
                    cells[Cell(label, arm, task, fraction, seed)] = name
    return cells


def _image_kind(config: Any) -> str:
    flags = dict(flag.split("=", 1) for flag in config.flags.pretrain)
    return flags.get("image.kind", "resnet")


def _path(workdir: Path, cell: Cell) -> Path:
    return workdir / "cells" / f"{cell.name}.json"


def _pairs(workdir: Path, commands: Commands) -> examples.Strip | None:
    """Real beside synthetic images, once both sets are there."""
    path = workdir / "cells" / "pairs.png"
    folders = [commands.folder(which) for which in ("real", "synthetic")]
    if not path.exists() and all((folder / shards.INFO).is_file() for folder in folders):
        examples.draw_pairs(path, *folders)
    return examples.read(path)


def _write_cell(workdir: Path, cell: Cell, commands: Commands, name: str) -> None:
    """Write the cell's part of the results of its command, with what the figures rest on; of the
    first seed also its picture and ROC curve, where the command left them."""
    command, config = commands.by_name[name], commands.config
    folder = workdir / "runs" / command.name
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    origin = json.loads((folder / "config.json").read_text())
    fraction = f"{100 * cell.fraction:g}%"
    encoder = cell.arm if cell.method == "none" else "pretrained"
    prefix = config.tasks[cell.task].figures.format(encoder=encoder, fraction=fraction)
    own = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    metric = config.tasks[cell.task].metric
    if own.setdefault(metric, {"value": None, "n": 0})["value"] is None:
        log.say(f"{cell.name}: {metric} is undefined: its records do not suffice for this figure")
    subset = folder / "fractions" / f"{fraction}-seed{cell.seed}.txt"
    split = hashlib.sha256(subset.read_bytes()).hexdigest() if subset.exists() else ""
    real = commands.folder("real") / shards.INFO
    entry = {
        "cell": asdict(cell),
        "metric": metric,
        "metrics": own,
        "split": split,
        "source": shards.read_object(real).get("source", "") if real.is_file() else "",
        "command": [command.config, *command.flags],
        "versions": origin["versions"],
        "commit": origin["commit"],
    }
    if cell.seed == 0:
        picture = examples.path(folder, encoder, fraction)
        if picture.exists():
            with replaced(_path(workdir, cell).with_suffix(".png")) as temporary:
                shutil.copyfile(picture, temporary)
        curves = picture.parent / "roc.json"
        if curves.exists():
            by_encoder = json.loads(curves.read_text())
            entry["roc"] = by_encoder.get(encoder, {}).get(fraction, {})
    outputs.write_json(_path(workdir, cell), entry)


class _Runner:
    """Runs commands after their prerequisites, several at a time."""

    def __init__(self, config: Any, workdir: Path, commands: Mapping[str, Command]):
        self.config, self.workdir, self.commands = config, workdir, commands
        self.cores = os.cpu_count() or 1
        self.workers = config.workers or self.cores
        self.failures: dict[str, str] = {}

    def run(self, names: set[str], finished: Callable[[str], None]) -> dict[str, str]:
        """Run the commands `names` and what they need; the failures, name -> reason.

        finished: is called with the name of each command that has ended well, now or before.
        """
        waiting = list(dict.fromkeys(n for name in sorted(names) for n in self._with_needs(name)))
        for name in [name for name in waiting if self._done(name).exists()]:
            waiting.remove(name)
            finished(name)
        count, running = len(waiting), dict[futures.Future, str]()
        with futures.ThreadPoolExecutor(self.workers) as pool:
            while waiting or running:
                busy = {*waiting, *running.values()}
                ready = [n for n in waiting if not busy & {*self.commands[n].needs}]
                for name in ready[: self.workers - len(running)]:
                    waiting.remove(name)
                    if lost := next(
                        (n for n in self.commands[name].needs if n in self.failures), ""
                    ):
                        self.failures[name] = f"needs {lost}"
                    else:
                        number = count - len(waiting)
                        log.say(f"command {number} of {count}: {name}")
                        running[pool.submit(self._run, self.commands[name])] = name
                if running:
                    done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
                    for future in done:
                        name = running.pop(future)
                        if reason := future.result():
                            log.say(f"failed: {name}: {reason}")
                            self.failures[name] = reason
                        else:
                            finished(name)
        return self.failures

    def _with_needs(self, name: str) -> Iterator[str]:
        for need in self.commands[name].needs:
            yield from self._with_needs(need)
        yield name

    def _done(self, name: str) -> Path:
        return self.workdir / "done" / name

    def _run(self, command: Command) -> str:
        """Run a command unless another process does or did; the reason of a failure, or ""."""
        with self._alone(command.name) as held:
            if self._done(command.name).exists():
                return ""
            config = f"{self.config.configs}/{command.config}.py:{self.config.variant}"
            main = [sys.executable, "-m", "medsyn_jax.main", "--config", config]
            workdir = self.workdir / "runs" / command.name
            arguments = [*main, "--workdir", str(workdir), *command.flags]
            # XLA on a CPU and OpenMP take so many threads.
            threads = str(max(1, self.cores // self.workers))
            environment = {**os.environ, "NPROC": threads, "OMP_NUM_THREADS": threads}
            path = self.workdir / "logs" / f"{command.name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"$ {' '.join(arguments)}\n")
                file.flush()
                status = subprocess.run(
                    arguments,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=(held,),  # if the study is killed, its command still holds the lock
                ).returncode
            if status:
                last = path.read_text(errors="replace").strip().splitlines()[-1]
                return shortened(f"status {status}, {last}", 300)
            self._done(command.name).parent.mkdir(exist_ok=True)
            self._done(command.name).write_text(" ".join(arguments) + "\n")
            return ""

    @contextmanager
    def _alone(self, name: str) -> Iterator[int]:
        """Hold the lock of a command, whose file descriptor is given, until all processes with it
        have ended: jobs of an array share runs."""
        path = self.workdir / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file.fileno()
