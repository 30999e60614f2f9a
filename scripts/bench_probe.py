"""Time the linear probe on given features: all fractions, seeds and intervals.

    python -m scripts.bench_probe [--records 5000] [--features 2048] [--labels 14]

Prints the mean AUROC of each fraction and the seconds of the whole. Random features stand in for
an encoder's, since the time depends only on their shape and on early stopping. Early stopping is
off: every fit runs its 50 epochs. Takes 71 to 84 s on two cores.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from configs.classify import get_config
from medsyn_jax.tasks import classify
from medsyn_jax.train.features import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("records", 5000), ("features", 2048), ("labels", 14)):
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
    config.probe.patience = config.probe.epochs
    policy = np.zeros(args.labels, np.int8)
    names = tuple(f"label {i}" for i in range(args.labels))
    task = classify.Task("multilabel", names, np.arange(args.labels), policy, policy)
    keys = [f"record/{i}" for i in range(args.records)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures = classify.probe_features(config, Path(folder), "made-up", task, tables, keys)
    seconds = time.perf_counter() - start
    for key, figure in figures.items():
        if key.endswith("mean"):
            print(f"{key}: {figure.values.mean():.3f}")
    print(
        f"{len(config.fractions)} fractions x {config.seeds} seeds on {args.records} records x "
        f"{args.features} features x {args.labels} labels, each of train, valid and test: "
        f"{seconds:.1f} s on {jax.devices()[0].device_kind}, compilation and intervals included"
    )


if __name__ == "__main__":
    main()
