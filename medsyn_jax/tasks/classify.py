"""Classification by pre-trained encoders at several label fractions, with baselines.

Three protocols, which name their figures: `linear-convex`, logistic regression on frozen features,
solved to convergence, whose figures vary with the records alone; `linear-adamw`, the published
linear one of MGCA (2210.06044); `finetuned`, where the encoder is trained, too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core import checks, log, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.estimates import Figure
from medsyn_jax.data.store import shards, splits
from medsyn_jax.objectives import classify
from medsyn_jax.train import (
    checkpoint,
    corpus,
    features,
    finetune,
    fractions,
    frozen,
    linear,
    pictures,
    probe,
)

FREE = corpus.FREE


def run(config: Any, workdir: Path) -> None:
    """Judge the pre-trained encoders, and the baselines: untrained ones, pixels and ImageNet's.

    Writes results.json with `<encoder>/<protocol>/test/<fraction>/<figure>/<label>` and, for
    classes, `.../accuracy`; figures are those of `metrics.label_figures`. `<encoder>-<other>/...`
    are paired differences. Raises UserError for an encoder, a data set or labels that do not fit
    the config.
    """
    corpus.check_labels(config.data.source, config.ingest)
    folders = _run_folders(config)
    for folder in folders.values():
        checkpoint.check_run(folder)  # restored after the data are prepared
    mesh = meshes.make_mesh(**config.mesh)
    directory = corpus.prepare(config.data.source, config.ingest, workdir.parent / "data")
    parts = {split: shards.open_split(directory, split) for split in splits.SPLITS}
    task = make_task(config.labels, parts["train"].label_names)
    if task.kind == "multilabel" and parts["train"].info["source"] == "folder":
        log.say("each record has one class folder: --config.labels.kind=multiclass judges classes")
    targets = {s: task.targets(features.labels(part), s == "test") for s, part in parts.items()}
    check_labels(task, targets)
    train = parts["train"]
    drawn = fractions.draw(config, workdir, task, targets, train.keys, train.subjects())
    encoders = _encoders(config, folders)
    outputs.write_config(workdir, config)
    figures: dict[str, dict[str, Figure]] = {}
    curves: dict[str, Any] = {}
    for name, group in encoders.items():
        by_protocol: dict[str, list[dict[str, Figure]]] = {}
        for number, encoder in enumerate(group):
            seeds = np.arange(number, config.seeds, len(group))
            settings = (config, name, encoder, task, drawn, targets, parts, seeds)
            by_fit, rates = _fitted(*settings, mesh, workdir)
            curves |= {name: rates} if rates else {}
            for protocol, fitted in by_fit.items():
                by_key = judged(task, drawn, fitted, targets, parts["test"].subjects())
                by_protocol.setdefault(protocol, []).append(by_key)
        figures |= {f"{name}/{p}": _merged(several) for p, several in by_protocol.items()}
    differences = _differences(list(folders), list(encoders), figures)
    results = {
        f"{name}/test/{key}": figure.estimate()
        for name, by_key in (figures | differences).items()
        for key, figure in by_key.items()
    }
    pictures.write_curves(workdir, curves)
    names = [fraction.name for fraction in drawn]
    if task.kind == "multilabel":
        _print_labels(task, figures, names, targets["test"])
    whole = "accuracy" if task.kind == "multiclass" and len(task.names) > 2 else "auroc/mean"
    _print_differences(whole, list(differences), names, results)
    shown = [f"{e}/test/{f}/{k}" for e in figures for f in names for k in _MAIN]
    outputs.write_results(workdir, "classify", results, shown=shown)


_MAIN = ("auroc/mean", "auprc/mean", "accuracy", "f1/mean", "ece/mean")


def _run_folders(config: Any) -> dict[str, Path]:
    """Name -> workdir of the pre-training runs; the name is the folder's, or else the path."""
    if not config.encoders:
        return {"pretrained": Path(config.encoder.workdir)}
    paths = [Path(folder) for folder in dict.fromkeys(config.encoders)]
    taken = Counter([path.name for path in paths] + ["pretrained", "random", "imagenet", "pixels"])
    unique = [path.name and taken[path.name] == 1 for path in paths]
    names = [p.name if u else str(p).replace("/", "-") for p, u in zip(paths, unique, strict=True)]
    return dict(zip(names, paths, strict=True))


def _encoders(
    config: Any, folders: Mapping[str, Path]
) -> dict[str, list[frozen.Encoder | features.Pixels]]:
    """The encoders of each name; of several, each is fitted with a part of the seeds.

    Each architecture has its untrained encoders: `random` is that of the first run.
    """
    encoders: dict[str, list[Any]] = {}
    untrained: dict[Any, tuple[str, Path]] = {}
    for name, folder in folders.items():
        encoder = replace(frozen.pretrained(folder), name=name)
        encoders[name] = [encoder]
        kind = (encoder.settings, encoder.size, encoder.crop, encoder.pixels)
        untrained.setdefault(kind, (f"random-{name}" if untrained else "random", folder))
    for name, folder in untrained.values() if config.untrained else ():
        seeds = range(config.seed, config.seed + min(config.untrained, config.seeds))
        encoders[name] = [replace(frozen.untrained(folder, seed), name=name) for seed in seeds]
    if config.encoder.weights:
        file = [config.encoder[field] for field in ("weights", "layout", "mean", "std")]
        encoders["imagenet"] = [frozen.imported(next(iter(folders.values())), *file)]
    encoders["pixels"] = [features.Pixels()]
    return encoders


def _fitted(
    config: Any,
    name: str,
    encoder: frozen.Encoder | features.Pixels,
    task: probe.Task,
    drawn: Sequence[fractions.Fraction],
    targets: Mapping[str, np.ndarray],
    parts: Mapping[str, shards.Records],
    seeds: np.ndarray,
    mesh: Mesh,
    workdir: Path,
) -> tuple[dict[str, list[dict[str, np.ndarray]]], pictures.Curves]:
    """Protocol -> logits of each fraction, as of `linear.logits`, and ROC curves of linear-convex
    for seed 0, whose heat maps are drawn."""
    fitted, tables, curves = {}, {}, {}
    for protocol in config.protocols:
        if protocol in linear.PROTOCOLS:
            sizes = {"batch_size": config.data.batch_size, "threads": config.data.threads}
            for split in parts if not tables else ():
                folder = workdir / "features"
                tables[split] = features.table(encoder, parts[split], mesh, folder, **sizes)
            fits = linear.PROTOCOLS[protocol](config, name, task, drawn, targets, tables, seeds)
            fitted[protocol] = [linear.logits(layers, tables) for layers in fits]
            if protocol == "linear-convex" and not seeds[0]:
                test = (parts["test"], tables["test"], targets["test"])
                curves = pictures.draw(workdir, encoder, name, task, drawn, fits, test)
        elif isinstance(encoder, features.Pixels):
            log.say(f"{name}, {protocol}: left out, because {name} have no encoder to train")
        else:
            settings = (task, drawn, targets, parts, seeds)
            fitted[protocol] = finetune.fit_all(config, name, encoder, *settings)
    return fitted, curves


def _merged(several: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Figures of all seeds from those of encoder k of n, which had the seeds k, k + n, ..."""
    first, n = several[0], len(several)
    if n == 1:
        return dict(first)
    merged = {}
    for key, figure in first.items():
        values = [each[key].values for each in several]
        seeds = np.concatenate([k + n * np.arange(len(x)) for k, x in enumerate(values)])
        order = np.argsort(seeds)
        draws = np.concatenate([each[key].draws for each in several], axis=1)
        merged[key] = replace(figure, values=np.concatenate(values)[order], draws=draws[:, order])
    return merged


def _differences(
    runs: Sequence[str], encoders: Sequence[str], figures: Mapping[str, Mapping[str, Figure]]
) -> dict[str, dict[str, Figure]]:
    """`<run>-<other>/<protocol>` -> differences of two runs, and of a run and a baseline, where
    the protocol has figures of both."""
    pairs = [*combinations(runs, 2), *((a, b) for a in runs for b in encoders if b not in runs)]
    protocols = dict.fromkeys(name.rpartition("/")[2] for name in figures)
    differences = {}
    for protocol in protocols:
        for a, b in pairs:
            one, other = (figures.get(f"{name}/{protocol}", {}) for name in (a, b))
            if not one or not other:
                continue
            differences[f"{a}-{b}/{protocol}"] = {k: one[k] - other[k] for k in one if k in other}
    return differences


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


def judged(
    task: probe.Task,
    drawn: Sequence[fractions.Fraction],
    fitted: Sequence[Mapping[str, np.ndarray]],
    targets: Mapping[str, np.ndarray],
    subjects: Sequence[str] | np.ndarray,
) -> dict[str, Figure]:
    """Figures on the test split, `<fraction>/<figure>` -> Figure.

    fitted: `linear.logits` of each fraction. subjects: [n], of the test records.
    """
    figures = {}
    for fraction, of in zip(drawn, fitted, strict=True):
        data = (of["test"], targets["test"], np.asarray(subjects), fraction.trained)
        by_key = probe.judge(task, *data, (of["valid"], targets["valid"]))
        figures |= {f"{fraction.name}/{key}": figure for key, figure in by_key.items()}
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
    shares: Sequence[str],
    test: np.ndarray,
) -> None:
    """Print rows of labels for each encoder and protocol: test records, AUROC by fraction ("-"
    for none). test: targets [n, c]."""
    rows = []
    for label, y in zip(task.names, test.T, strict=True):
        for name, by_key in figures.items():
            cells = [by_key.get(f"{f}/auroc/{label}") for f in shares]
            values = [f"{x.values.mean():.3f}" if x is not None else "-" for x in cells]
            rows.append([label, str((y >= 0).sum()), str((y == 1).sum()), name, *values])
    log.table(["AUROC, test split", "n", "positive", "encoder", *shares], rows)


def _print_differences(
    figure: str,
    differences: Sequence[str],
    shares: Sequence[str],
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """Print a row for each difference of encoders: a figure with its interval by fraction."""

    def cell(entry: Mapping[str, Any]) -> str:
        low, high = entry.get("ci95") or (None, None)
        value = log.number(entry["value"], "+.3f")
        return f"{value} [{log.number(low, '+.3f')}, {log.number(high, '+.3f')}]"

    rows = [[d, *(cell(results[f"{d}/test/{f}/{figure}"]) for f in shares)] for d in differences]
    log.table([f"{figure}: paired difference", *shares], rows)


PROTOCOLS = (*linear.PROTOCOLS, "finetuned")


def _check_protocols(config: Any) -> None:
    if not config.protocols:
        raise UserError(f"config.protocols: (): name at least one of {', '.join(PROTOCOLS)}")


CHECKS = (
    *probe.RULES,
    *finetune.RULES,
    checks.numbers("from 0", "", "untrained"),
    checks.numbers("above 0", "", "inverse_penalties"),
    checks.choices("protocols", PROTOCOLS),
    _check_protocols,
    checks.texts("", "encoders"),
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
