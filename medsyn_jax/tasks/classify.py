"""Linear classification: linear probes on frozen encoders at several label fractions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from medsyn_jax.core import checks, log, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.estimates import Figure
from medsyn_jax.data.store import shards, splits
from medsyn_jax.objectives import classify
from medsyn_jax.train import checkpoint, corpus, features, frozen, probe
from medsyn_jax.train.fractions import label_subsets

FREE = ("mesh.", "data.threads", "data.batch_size", "ingest.workers")


def run(config: Any, workdir: Path) -> None:
    """Probe the pre-trained, the untrained and, if given, the ImageNet encoder.

    Writes results.json with `<encoder>/test/<fraction>/auroc/<label>`, `.../auroc/mean` and, for
    classes, `.../accuracy`; `pretrained-random/...` are differences of the two encoders. Raises
    UserError for an encoder, a data set or labels that do not fit the config.
    """
    corpus.check_labels(config.data.source, config.ingest)
    run_folder = Path(config.encoder.workdir)
    checkpoint.check_run(run_folder)  # restored after the data are prepared
    mesh = meshes.make_mesh(**config.mesh)
    directory = corpus.prepare(config.data.source, config.ingest, workdir.parent / "data")
    parts = {split: shards.open_split(directory, split) for split in splits.SPLITS}
    task = make_task(config.labels, parts["train"].label_names)
    if task.kind == "multilabel" and parts["train"].info["source"] == "folder":
        log.say("each record has one class folder: --config.labels.kind=multiclass judges classes")
    targets = {s: task.targets(features.labels(part), s == "test") for s, part in parts.items()}
    check_labels(task, targets)
    fractions = make_fractions(config, workdir, task, targets, parts["train"].keys)
    encoders = [frozen.pretrained(run_folder), frozen.untrained(run_folder, config.seed)]
    if config.encoder.weights:
        file = [config.encoder[field] for field in ("weights", "layout", "mean", "std")]
        encoders.append(frozen.imported(run_folder, *file))
    outputs.write_config(workdir, config)
    figures: dict[str, dict[str, Figure]] = {}
    sizes = {"batch_size": config.data.batch_size, "threads": config.data.threads}
    for encoder in encoders:
        tables = {
            split: features.table(encoder, records, mesh, workdir / "features", **sizes)
            for split, records in parts.items()
        }
        figures[encoder.name] = probe_features(
            config, encoder.name, task, fractions, targets, tables
        )
    pretrained, random = figures["pretrained"], figures["random"]
    figures["pretrained-random"] = {key: pretrained[key] - random[key] for key in pretrained}
    results = {
        f"{name}/test/{key}": figure.estimate()
        for name, by_key in figures.items()
        for key, figure in by_key.items()
    }
    if task.kind == "multilabel":
        _print_labels(task, figures, [fraction.name for fraction in fractions], targets["test"])
    whole = [name for name in results if name.endswith(("/mean", "/accuracy"))]
    outputs.write_results(workdir, "classify", results, shown=whole)


CHECKS = (
    *probe.RULES,
    checks.numbers("share", "encoder", "mean"),
    checks.numbers("part", "encoder", "std"),
    checks.numbers("part", "", "fractions"),
    checks.texts("labels", "names uncertain_ones uncertain_zeros"),
    corpus.check_source,
    checks.files(
        lambda config: (
            corpus.file("data.source", config.data.source)
            | {"encoder.weights": config.encoder.weights, "fractions_from": config.fractions_from}
        )
    ),
)


def make_task(settings: Any, available: Sequence[str]) -> probe.Task:
    """The task of a `labels` section on a data set with the labels `available`."""
    names = tuple(settings.names) or tuple(available)
    for field in ("names", "uncertain_ones", "uncertain_zeros"):
        unknown = [name for name in settings[field] if name not in available]
        if unknown:
            raise UserError(
                f"config.labels.{field}: {', '.join(unknown)}: not among the labels of the data "
                f"set, which are {', '.join(available) or 'none'}"
            )
    fewest = {"multilabel": 1, "multiclass": 2}
    if settings.kind not in fewest:
        raise UserError(f"config.labels.kind: {settings.kind!r}: use {' or '.join(fewest)}")
    if len(names) < fewest[settings.kind]:
        raise UserError(f"config.labels.names: {names}: too few labels for {settings.kind}")

    def policy(name: str) -> int:
        if name in settings.uncertain_ones:
            return 1
        return 0 if name in settings.uncertain_zeros else classify.UNMENTIONED

    unmentioned = 0 if settings.unmentioned_zero else classify.UNMENTIONED
    return probe.Task(
        settings.kind,
        names,
        np.array([list(available).index(name) for name in names]),
        np.array([policy(name) for name in names], np.int8),
        np.full(len(names), unmentioned, np.int8),
    )


@dataclass(frozen=True)
class Fraction:
    """The training records of each seed at one label fraction, and the labels they suffice for."""

    name: str  # "1%"
    subsets: np.ndarray  # int32 [s, k]: rows of the train split, padded with -1
    trained: np.ndarray  # bool [c]: labels with a positive and a negative for every seed


def make_fractions(
    config: Any, workdir: Path, task: probe.Task, targets: Mapping[str, np.ndarray], keys: list[str]
) -> list[Fraction]:
    """The label fractions with figures; prints the other fractions and the labels left out.

    A label counts at a fraction if the records of each seed have a positive and a negative of it,
    so that all seeds and encoders are judged on the same labels. Raises UserError if no fraction is
    left.
    """
    if task.kind == "multilabel" and min(config.fractions) < 1 and not config.fractions_from:
        log.say("label fractions are drawn without regard to labels: records may have several")
    train, fractions = targets["train"], []
    for share in config.fractions:
        name = f"{100 * share:g}%"
        subsets = label_subsets(config, workdir, share, keys, train if train.ndim == 1 else None)
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


def probe_features(
    config: Any,
    name: str,
    task: probe.Task,
    fractions: Sequence[Fraction],
    targets: Mapping[str, np.ndarray],
    tables: Mapping[str, features.Table],
) -> dict[str, Figure]:
    """Figures of one encoder on the test split, `<fraction>/<figure>` -> Figure."""
    train_x, valid_x, test_x = (jnp.asarray(tables[s].features) for s in splits.SPLITS)
    figures = {}
    for fraction in fractions:
        # Early stopping must not depend on labels that the probe cannot learn.
        valid = task.without(targets["valid"], ~fraction.trained)
        fitted = probe.fit_seeds(
            task,
            (train_x, targets["train"]),
            (valid_x, valid),
            fraction.subsets,
            seed=config.seed,
            settings=config.probe,
            where=f" at {fraction.name} of the labels on {name} features",
        )
        log.say(
            f"{name}, {fraction.name} of the labels ({fraction.subsets.shape[1]} records): best "
            f"validation {', '.join(f'{x:.3f}' for x in fitted.score.tolist())} at epoch "
            f"{', '.join(map(str, fitted.best_epoch.tolist()))} of {config.probe.epochs}"
        )
        logits = np.asarray(probe.logits(fitted, test_x))
        subjects = tables["test"].subjects
        judged = probe.judge(task, logits, targets["test"], subjects, fraction.trained)
        figures |= {f"{fraction.name}/{key}": figure for key, figure in judged.items()}
    return figures


def check_labels(task: probe.Task, targets_of: Mapping[str, np.ndarray]) -> None:
    """Raise UserError if no label has both classes in a split; print labels without both."""
    for split, targets in targets_of.items():
        usable = probe.has_both(task.columns_of(targets))
        if not usable.any():
            raise UserError(
                f"config.labels: no label of {', '.join(task.names)} has both a positive and a "
                f"negative record in the {split} split: name others, or use more data"
            )
        lacking = ", ".join(n for n, both in zip(task.names, usable, strict=True) if not both)
        if lacking and split == "test" and task.kind == "multilabel":
            log.say(f"no AUROC of {lacking}: one class only in the test split")
        elif lacking and split in ("valid", "test"):
            blind = "; early stopping cannot see that" if split == "valid" else ""
            log.say(f"one class only of {lacking} in the {split} split{blind}")


def _print_labels(
    task: probe.Task,
    figures: Mapping[str, Mapping[str, Figure]],
    fractions: Sequence[str],
    test: np.ndarray,
) -> None:
    """Print a row a label: test records, AUROC by encoder and fraction ("-" for none), gains.

    test: targets [n, c].
    """
    rows = []
    for label, y in zip(task.names, test.T, strict=True):
        cells = [by.get(f"{f}/auroc/{label}") for by in figures.values() for f in fractions]
        values = [f"{x.values.mean():.3f}" if x is not None else "-" for x in cells]
        rows.append([label, str((y >= 0).sum()), str((y == 1).sum()), *values])
    heads = [f"{name} {f}" if f == fractions[0] else f for name in figures for f in fractions]
    log.table(["AUROC, test split", "n", "positive", *heads], rows)
