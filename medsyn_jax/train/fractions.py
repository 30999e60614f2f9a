"""Label fractions of a run: which training records each seed learns from, kept as files."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsyn_jax.core import log
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import full_disk_is_user_error
from medsyn_jax.data.store import splits


def label_subsets(
    config: Any,
    workdir: Path,
    share: float,
    keys: list[str],
    classes: np.ndarray | None,
    subjects: np.ndarray | None = None,
) -> np.ndarray:
    """Rows int32 [s, k], padded with -1, of the training records that each seed learns from.

    They are read from files in `config.fractions_from`, or in fractions/ of this run. A missing
    file of this run is written; its records are a function of the arguments alone, and a smaller
    share lies within a larger one of the same seed.

    Args:
        config: with `fractions_from`, `seed` and `seeds`.
        workdir: of the run.
        share: above 0, at most 1.
        keys: of the training records.
        classes: int [n], drawn in proportion. Without classes (several labels a record) the draw
            disregards labels, and a small share may lack a rare one.
        subjects: [n] of the records; whole subjects are then drawn, in proportion to the largest
            class of their records.
    """
    row_of = {key: row for row, key in enumerate(keys)}
    folder, chosen = config.fractions_from or workdir / "fractions", []
    for seed in range(config.seed, config.seed + config.seeds):
        path = Path(folder) / f"{100 * share:g}%-seed{seed}.txt"
        if config.fractions_from or path.exists():
            chosen.append(splits.read_fraction(path, row_of))
            continue
        drawn = _drawn(keys, classes, subjects, share, seed)
        chosen.append([row_of[key] for key in drawn])
        if jax.process_index() == 0:
            with full_disk_is_user_error(path):
                splits.write_fraction(path, drawn)
    padded = np.full((len(chosen), max(map(len, chosen))), -1, np.int32)
    for row, rows in zip(padded, chosen, strict=True):
        row[: len(rows)] = rows
    return padded


def _drawn(
    keys: list[str],
    classes: np.ndarray | None,
    subjects: np.ndarray | None,
    share: float,
    seed: int,
) -> list[str]:
    if subjects is None:
        return splits.fraction(keys, classes, share, seed)
    names, unit = np.unique(subjects, return_inverse=True)
    largest = np.zeros(len(names), int)
    if classes is not None:
        np.maximum.at(largest, unit, classes)
    drawn = set(splits.fraction(names.tolist(), largest, share, seed))
    return [key for key, subject in zip(keys, subjects.tolist(), strict=True) if subject in drawn]


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
        rows = label_subsets(config, workdir, share, keys, positive.astype(int), subjects)
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
