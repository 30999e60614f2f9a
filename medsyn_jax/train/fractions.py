"""Label fractions: the training records of each seed, and the labels that they can teach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsyn_jax.core import log
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.store import splits
from medsyn_jax.train import probe


@dataclass(frozen=True)
class Fraction:
    """The training records of each seed at one label fraction, and the labels they suffice for."""

    name: str  # "1%"
    subsets: np.ndarray  # int32 [s, k]: rows of the train split, padded with -1
    trained: np.ndarray  # bool [c]: labels with a positive and a negative for every seed


def draw(
    config: Any,
    workdir: Path,
    task: probe.Task,
    targets: Mapping[str, np.ndarray],
    keys: list[str],
    subjects: list[str],
) -> list[Fraction]:
    """The label fractions with figures; prints their positive and negative records, the other
    fractions and the labels left out. keys, subjects: of the training records.

    A label counts at a fraction if the records of each seed have a positive and a negative of it,
    so that all seeds and encoders are judged on the same labels. Raises UserError if no fraction is
    left.
    """
    train, fractions = targets["train"], []
    for share in config.fractions:
        name = f"{100 * share:g}%"
        subsets = label_subsets(config, workdir, share, keys, train, subjects)
        columns = task.columns_of(train)
        seeds = {config.seed + i: columns[rows[rows >= 0]] for i, rows in enumerate(subsets)}
        trained = np.logical_and.reduce([probe.has_both(y) for y in seeds.values()])
        names = [f"{n} ({_lack(seeds, i)})" for i, n in enumerate(task.names) if not trained[i]]
        if names:
            log.say(
                f"{name} of the labels: left out, not taught by its records: {', '.join(names)}"
            )
        for split in ("valid", "test"):
            rest = task.columns_of(task.without(targets[split], ~trained))
            if not probe.has_both(rest).any():
                log.say(
                    f"{name} of the labels: no figure at all: none of the labels that are left has "
                    f"both a positive and a negative record in the {split} split"
                )
                break
        else:
            fractions.append(Fraction(name, subsets, trained))
    if not fractions:
        raise UserError(
            f"config.fractions: {config.fractions}: at none of them does a label of "
            f"{', '.join(task.names)} have both a positive and a negative record for every seed, "
            "in valid and in test: use larger fractions, fewer seeds, or more data"
        )
    _print_counts(task, fractions, task.columns_of(train))
    return fractions


def _lack(seeds: Mapping[int, np.ndarray], label: int) -> str:
    """Which classes of a label the training records lack, such as "no positive for seed 1".

    seeds: seed -> labels [n, c] of its training records.
    """
    lack = []
    for noun, value in (("positive", 1), ("negative", 0)):
        which = [str(seed) for seed, y in seeds.items() if not (y[:, label] == value).any()]
        of = f" for seed {', '.join(which)}" if len(which) < len(seeds) else ""
        lack += [f"no {noun}{of}"] if which else []
    return ", ".join(lack)


def with_positives(
    config: Any,
    workdir: Path,
    keys: list[str],
    subjects: np.ndarray,
    positive: np.ndarray,
    what: str,
) -> dict[str, np.ndarray]:
    """Name -> rows int32 [s, k] of each seed, of `config.fractions` with a positive for each seed.

    Subjects are drawn, those with a positive record in proportion; see `label_subsets`. Prints the
    fractions left out.

    Args:
        positive: bool [n], the training records that have `what`, such as "box".

    Raises:
        UserError: if no fraction is left.
    """
    fractions = {}
    for share in config.fractions:
        name = f"{100 * share:g}%"
        rows = label_subsets(
            config, workdir, share, keys, positive.astype(np.int8)[:, None], subjects
        )
        lacking = [config.seed + i for i, r in enumerate(rows) if not positive[r[r >= 0]].any()]
        if lacking:
            log.say(
                f"{name} of the labels: no figure: the images of seed "
                f"{', '.join(map(str, lacking))} have no {what}"
            )
        else:
            fractions[name] = rows
    if not fractions:
        raise UserError(
            f"config.fractions: {config.fractions}: none has an image with a {what} for every "
            "seed: use larger fractions, or more data"
        )
    return fractions


def label_subsets(
    config: Any,
    workdir: Path,
    share: float,
    keys: list[str],
    labels: np.ndarray | None,
    subjects: Sequence[str] | np.ndarray | None = None,
) -> np.ndarray:
    """Rows int32 [s, k], padded with -1, of the training records that each seed learns from.

    They are read from files in `config.fractions_from`, or in fractions/ of this run. A missing
    file of this run is written; its records are a function of the arguments alone
    (`splits.fraction`). labels: int [n] classes or [n, l] labels, None for a draw without regard to
    them; subjects: [n], drawn as a whole (default: each record is one).
    """
    labels = np.zeros((len(keys), 0), np.int8) if labels is None else labels
    subjects = keys if subjects is None else list(subjects)
    row_of = {key: row for row, key in enumerate(keys)}
    folder, chosen = config.fractions_from or workdir / "fractions", []
    for seed in range(config.seed, config.seed + config.seeds):
        path = Path(folder) / f"{100 * share:g}%-seed{seed}.txt"
        if config.fractions_from or path.exists():
            chosen.append(splits.read_fraction(path, row_of))
            continue
        drawn = splits.fraction(keys, subjects, labels, share, seed)
        chosen.append([row_of[key] for key in drawn])
        if jax.process_index() == 0:
            splits.write_fraction(path, drawn)
    padded = np.full((len(chosen), max(map(len, chosen))), -1, np.int32)
    for row, rows in zip(padded, chosen, strict=True):
        row[: len(rows)] = rows
    return padded


def _print_counts(task: probe.Task, fractions: Sequence[Fraction], labels: np.ndarray) -> None:
    """Print a row a label: positive / negative training records of each fraction, the fewest and
    the most of any seed. labels: [n, c]."""
    rows = [[name] for name in task.names]
    for fraction in fractions:
        drawn = [labels[rows[rows >= 0]] for rows in fraction.subsets]
        sides = [np.stack([(y == value).sum(axis=0) for y in drawn]) for value in (1, 0)]
        for i, row in enumerate(rows):
            ends = [(side[:, i].min(), side[:, i].max()) for side in sides]
            row.append(" / ".join(str(a) if a == b else f"{a}-{b}" for a, b in ends))
    log.table(["training records, positive / negative", *(f.name for f in fractions)], rows)
