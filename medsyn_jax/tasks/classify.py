"""Linear classification: what a linear layer reads off a frozen encoder, by label fraction."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medsyn_jax.core import log, metrics
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.config import check_files, check_numbers
from medsyn_jax.core.errors import UserError
from medsyn_jax.curation import estimates
from medsyn_jax.curation.estimates import Figure
from medsyn_jax.data import shards, splits
from medsyn_jax.objectives import classify
from medsyn_jax.train import corpus, encoders, features, probe

FREE = ("mesh.", "data.threads", "data.batch_size", "ingest.workers")


@dataclass(frozen=True)
class Task:
    """The labels of a data set as the probe is taught them."""

    kind: probe.Kind
    names: tuple[str, ...]
    columns: np.ndarray  # int [c] in the labels of the data set
    uncertain: np.ndarray  # int8 [c]: what -1 counts as in training and validation
    unmentioned: np.ndarray  # int8 [c]: what -2 counts as, everywhere

    def targets(self, labels: np.ndarray, test: bool = False) -> np.ndarray:
        """int8 [n, c] (1, 0, -2 left out), or int32 [n] classes (-2 left out), of int8 [n, l].

        In a test split "uncertain" is left out whatever the policy: nobody knows the answer.
        """
        chosen = jnp.asarray(labels[:, self.columns])
        uncertain = np.full_like(self.uncertain, classify.UNMENTIONED) if test else self.uncertain
        known = np.asarray(
            classify.apply_policy(chosen, jnp.asarray(uncertain), jnp.asarray(self.unmentioned))
        )
        if self.kind == "multilabel":
            return known
        one = (known == 1).sum(axis=1) == 1
        return np.where(one, (known == 1).argmax(axis=1), classify.UNMENTIONED).astype(np.int32)


def run(config: Any, workdir: Path) -> None:
    """Probe the pre-trained, the untrained and, if given, the ImageNet encoder alike.

    Writes results.json with `<encoder>/test/<fraction>/auroc/<label>`, `.../auroc/mean` and, for
    classes, `.../accuracy`; and `pretrained-random/...`, the difference of the last two.
    Raises UserError for an encoder, a data set or labels that do not fit the config.
    """
    _check(config)
    found = _encoders(config)
    log.check_config(workdir, config, FREE)
    corpus.check_labels(config.data.source, config.ingest)
    mesh = meshes.make_mesh(**config.mesh)
    directory = corpus.prepare(config.data.source, config.ingest, workdir.parent / "data")
    parts = {split: shards.open_split(directory, split) for split in splits.SPLITS}
    task = make_task(config.labels, parts["train"].label_names)
    log.write_config(workdir, config, FREE)
    if task.kind == "multilabel" and min(config.fractions) < 1 and not config.fractions_from:
        log.say("label fractions are drawn without regard to labels: records may have several")
    figures: dict[str, dict[str, Figure]] = {}
    for encoder in found:
        tables = {
            split: features.table(
                encoder,
                records,
                mesh,
                workdir / "features",
                batch_size=config.data.batch_size,
                threads=config.data.threads,
            )
            for split, records in parts.items()
        }
        figures[encoder.name] = probe_features(
            config, workdir, encoder.name, task, tables, parts["train"].keys
        )
    results = {
        f"{name}/test/{key}": figure.estimate()
        for name, by_key in figures.items()
        for key, figure in by_key.items()
    }
    for key, figure in figures["pretrained"].items():
        if not key.endswith(("mean", "accuracy")):
            continue  # label by label they can be had from the two
        gain = figure - figures["random"][key]
        results[f"pretrained-random/test/{key}"] = gain.estimate()
    log.write_results(workdir, "classify", {k: dict(v) for k, v in results.items()})


def _check(config: Any) -> None:
    """All that the config alone tells to be wrong, and the files that it names but nobody has."""
    above_0 = ("data.batch_size", "seeds", "probe.learning_rate", "probe.batch_size")
    above_0 += ("probe.epochs", "probe.patience", "encoder.std")
    check_numbers(config, above_0, from_0=("data.threads", "probe.weight_decay"))
    if not config.data.source:
        raise UserError(
            "config.data.source: is empty: give the folder of class folders, a CSV of pairs or an "
            "ingested data set, by --config.data.source=PATH"
        )
    if not config.fractions or not all(0 < share <= 1 for share in config.fractions):
        raise UserError(f"config.fractions: {config.fractions}: give shares above 0 and at most 1")
    raw = config.data.source != "phantom" and jax.process_index() == 0  # the only one to read it
    source = config.data.source if raw else ""
    named = {"data.source": source, "encoder.weights": config.encoder.weights}
    check_files(named | {"fractions_from": config.fractions_from})


def _encoders(config: Any) -> list[encoders.Encoder]:
    settings, workdir = config.encoder, Path(config.encoder.workdir)
    found = [encoders.pretrained(workdir), encoders.untrained(workdir, config.seed)]
    if settings.weights:
        given = (settings.weights, settings.layout, settings.mean, settings.std)
        found.append(encoders.imported(workdir, *given))
    return found


def make_task(settings: Any, available: Sequence[str]) -> Task:
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
    return Task(
        settings.kind,
        names,
        np.array([list(available).index(name) for name in names]),
        np.array([policy(name) for name in names], np.int8),
        np.full(len(names), unmentioned, np.int8),
    )


def probe_features(
    config: Any,
    workdir: Path,
    name: str,
    task: Task,
    tables: dict[str, features.Table],
    keys: list[str],
) -> dict[str, Figure]:
    """Figures on the test split, `<fraction>/<figure>` -> Figure, of one encoder's features."""
    train, valid = (task.targets(tables[split].labels) for split in ("train", "valid"))
    test = task.targets(tables["test"].labels, test=True)
    _check_labels(task, {"train": train, "valid": valid, "test": test})
    settings = probe.ProbeSettings(kind=task.kind, **config.probe)
    seeds = [jax.random.fold_in(jax.random.key(config.seed), i) for i in range(config.seeds)]
    arrays = [tables["train"].features, train, tables["valid"].features, valid]
    train_x, train_y, valid_x, valid_y = map(jnp.asarray, arrays)
    figures = {}
    for share in config.fractions:
        fraction = f"{100 * share:g}%"
        subsets = _subsets(config, workdir, share, keys, train if train.ndim == 1 else None)
        fitted = probe.fit(
            train_x,
            train_y,
            jnp.asarray(subsets),
            valid_x,
            valid_y,
            jnp.stack(seeds),
            classes=len(task.names),
            settings=settings,
        )
        scores = np.asarray(fitted.score)
        if not np.isfinite(scores).all():
            raise UserError(
                f"config.probe.learning_rate: {settings.learning_rate}: the fit at {fraction} of "
                f"the labels diverged on {name} features: use a smaller one"
            )
        log.say(
            f"{name}, {fraction} of the labels ({subsets.shape[1]} records): best validation "
            f"{', '.join(f'{x:.3f}' for x in scores)} at epoch "
            f"{', '.join(map(str, fitted.best_epoch.tolist()))} of {config.probe.epochs}"
        )
        outputs = np.asarray(probe.logits(fitted, jnp.asarray(tables["test"].features)))
        judged = judge(task, outputs, test, tables["test"].subjects)
        figures |= {f"{fraction}/{key}": figure for key, figure in judged.items()}
    return figures


def _check_labels(task: Task, targets_of: dict[str, np.ndarray]) -> None:
    """Refuse labels from which nothing can be learnt, no epoch chosen, or no figure computed."""
    for split, targets in targets_of.items():
        if targets.ndim == 1:
            usable = len(np.unique(targets[targets >= 0])) > 1
        else:
            usable = bool(((targets == 1).any(axis=0) & (targets == 0).any(axis=0)).any())
        if not usable:
            raise UserError(
                f"config.labels: no label of {', '.join(task.names)} has both a positive and a "
                f"negative record in the {split} split: name others, or use more data"
            )


def _subsets(
    config: Any, workdir: Path, share: float, keys: list[str], classes: np.ndarray | None
) -> np.ndarray:
    """Rows int32 [s, k], padded with -1, of the training records that each seed learns from.

    They are read from `config.fractions_from`, or else from fractions/ of this run. What is not
    there is drawn, a function of the keys, the share and the seed alone, and written there. classes
    [n]: each is drawn in its own proportion; without them (several labels a record) the draw pays
    no regard to labels, so that a rare one may be missing from a small share.
    """
    place = {key: row for row, key in enumerate(keys)}
    given, chosen = config.fractions_from, []
    for seed in range(config.seed, config.seed + config.seeds):
        path = Path(given or workdir / "fractions") / f"{100 * share:g}%-seed{seed}.txt"
        if given or path.exists():
            chosen.append(splits.read_fraction(path, place))
            continue
        drawn = splits.fraction(keys, classes, share, seed)
        chosen.append([place[key] for key in drawn])
        if jax.process_index() == 0:
            with log.full_disk_is_user_error(path):
                splits.write_fraction(path, drawn)
    padded = np.full((len(chosen), max(map(len, chosen))), -1, np.int32)
    for row, rows in zip(padded, chosen, strict=True):
        row[: len(rows)] = rows
    return padded


def judge(
    task: Task, outputs: np.ndarray, test: np.ndarray, subjects: np.ndarray
) -> dict[str, Figure]:
    """AUROC of each label and their mean (two classes: of the second), accuracy of classes.

    outputs: logits [s, n, c]; test: targets [n, c] or classes [n]. A label that has one class only
    in the test split has no AUROC and is left out, with a line that says so.
    """
    figures = {}
    if test.ndim == 1:
        predicted = outputs.argmax(axis=-1)

        def accuracies(w: np.ndarray) -> np.ndarray:
            return np.stack([metrics.accuracy(p, test, w) for p in predicted], axis=1)

        figures["accuracy"] = estimates.figure(accuracies, test >= 0, subjects)
        if len(task.names) > 2:
            return figures
        names, test = task.names[1:], test[:, None]
        outputs = outputs[..., 1:] - outputs[..., :1]
    else:
        names = task.names
    defined = [i for i in range(len(names)) if {0, 1} <= set(test[:, i].tolist())]
    left_out = [name for i, name in enumerate(names) if i not in defined]
    if left_out:
        log.say(f"no AUROC of {', '.join(left_out)}: one class only in the test split")
    names = [names[i] for i in defined]
    found = estimates.auroc_figures(outputs[..., defined], test[:, defined], names, subjects)
    return figures | {f"auroc/{name}": figure for name, figure in found.items()}
