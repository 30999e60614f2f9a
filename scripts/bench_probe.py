"""Time both linear probes on given features, and compare how far refits of the same data differ.

    python -m scripts.bench_probe [--records 5000] [--features 2048] [--labels 14] [--refits 18]

Random features stand in for an encoder's. Times: all fractions, seeds, labels and penalties,
compilation included; the intervals of all figures apart, since they are the same for both. Early
stopping of AdamW is off in the time: every fit runs its 50 epochs. Refits: AdamW from other starts
and orders of the records; the convex probe with the records in other orders.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.classify import get_config
from medsyn_jax.core import metrics
from medsyn_jax.tasks import classify
from medsyn_jax.train import fractions, linear, logistic, probe
from medsyn_jax.train.features import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = (("records", 5000), ("features", 2048), ("labels", 14), ("refits", 18))
    for name, default in defaults:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    slopes = rng.normal(size=(args.features, args.labels)) / args.features**0.5

    def table() -> Table:
        x = np.maximum(rng.normal(size=(args.records, args.features)), 0).astype(np.float32)
        noise = rng.normal(size=(args.records, args.labels))
        labels = ((x - x.mean(0)) @ slopes + noise > 0.8).astype(np.int8)
        return Table(x, labels, np.arange(args.records).astype(str))

    tables = {split: table() for split in ("train", "valid", "test")}
    config = get_config()
    policy = np.zeros(args.labels, np.int8)
    names = tuple(f"label {i}" for i in range(args.labels))
    task = probe.Task("multilabel", names, np.arange(args.labels), policy, policy)
    keys = [f"record/{i}" for i in range(args.records)]
    targets = {split: task.targets(t.labels, split == "test") for split, t in tables.items()}
    with tempfile.TemporaryDirectory() as folder:
        drawn = fractions.draw(config, Path(folder), task, targets, keys, keys)
    sizes = f"{args.records} records x {args.features} features x {args.labels} labels"
    print(f"{sizes}, each of train, valid and test, on {jax.devices()[0].device_kind}")

    patience, config.probe.patience = config.probe.patience, config.probe.epochs
    for protocol, fit in linear.PROTOCOLS.items():
        start = time.perf_counter()
        fits = fit(config, "made-up", task, drawn, targets, tables, np.arange(config.seeds))
        jax.block_until_ready(fits)
        fitted = time.perf_counter()
        outputs = [linear.logits(layers, tables) for layers in fits]
        figures = classify.judged(task, drawn, outputs, targets, tables["test"].subjects)
        judged = time.perf_counter()
        means = [f"{f.name} {figures[f'{f.name}/auroc/mean'].values.mean():.3f}" for f in drawn]
        print(
            f"{protocol}: {len(drawn)} fractions x {config.seeds} seeds in {fitted - start:.1f} s, "
            f"their intervals in {judged - fitted:.1f} s; mean AUROC {', '.join(means)}",
            flush=True,
        )

    config.probe.patience = patience
    train, valid = ((tables[s].features, targets[s]) for s in ("train", "valid"))
    for fraction in drawn[:-1]:
        rows = fraction.subsets[0][fraction.subsets[0] >= 0]
        tiled = np.tile(rows, (args.refits, 1))
        adamw = probe.fit_seeds(task, train, valid, tiled, seed=0, settings=config.probe)
        convex = []
        for _ in range(args.refits):
            order = rng.permutation(args.records)
            moved = np.argsort(order)[rows][None].astype(np.int32)
            settings = {"inverse_penalties": config.inverse_penalties}
            shuffled = (train[0][order], train[1][order])
            convex += logistic.fit_seeds(task, shuffled, valid, [moved], **settings)
        for name, layers in (("linear-adamw", [adamw]), ("linear-convex", convex)):
            aurocs = []
            for layer in layers:
                logits = np.asarray(probe.logits(layer, jnp.asarray(tables["test"].features)))
                aurocs += [mean_auroc(x, targets["test"]) for x in logits]
            print(
                f"{name}, {len(aurocs)} refits of one subset of {fraction.name}: AUROC "
                f"{min(aurocs):.6f} to {max(aurocs):.6f}, range {np.ptp(aurocs):.1e}",
                flush=True,
            )


def mean_auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the labels, of logits and labels [n, c]."""
    return float(np.mean([metrics.auroc(logits[:, i], y)[0] for i, y in enumerate(labels.T)]))


if __name__ == "__main__":
    main()
