"""Measure how many images a second the loader delivers on this machine, stage by stage.

    python scripts/bench_loader.py [--data DIR] [--size 256] [--tokens 96] [--batch-size 64]
        [--threads 1 2] [--step-images-per-second N]

Prints the rate of each stage, and of whole batches from disk and from memory. Without --data the
script first writes a small phantom corpus. The last line gives the rate of a training step above
which training would wait for data. With --step-images-per-second, the rate that the progress line
shows in a training that does not wait, it says whether that training would wait.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs.ingest import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading import loader
from medsyn_jax.data.store import build, shards
from medsyn_jax.data.text import tokenizers

SECTIONS = ("findings", "impression")
SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="directory of shards; default: a phantom corpus")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--tokenizer", help="a Hugging Face tokenizer folder")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--step-images-per-second", type=float, help="rate of a training step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(options.data) if options.data else phantoms(Path(folder), options.size)
        report(options, data, Path(folder))


def phantoms(folder: Path, size: int) -> Path:
    config = get_config("demo").ingest
    config.update({"size": size, "split_shares": (1.0, 0.0, 0.0)})
    config.phantom.update({"subjects": 256, "studies_per_subject": 2})
    return build.ingest(config, folder / "shards")


def report(options: argparse.Namespace, data: Path, folder: Path) -> None:
    records = shards.open_split(data, "train")
    if options.tokenizer:
        tokenizer = tokenizers.load(options.tokenizer)
    else:
        texts = [shards.text(records.features(i), SECTIONS) for i in range(min(len(records), 2000))]
        texts = texts if any(texts) else ["no report"] * 2
        tokenizer = tokenizers.train_wordpiece(texts, 1000, folder / "tokenizer")

    def source(cache_mib: int) -> loader.Source:
        size = (options.tokens, options.size)
        return loader.Source(data, "train", SECTIONS, tokenizer, *size, cache_mib=cache_mib)

    print(f"\n{data}: {len(records)} records, {os.cpu_count()} CPUs")
    print(f"{'stage':<28}{'CPU us':>12}{'records/s':>12}")
    stages(records, source(0), tokenizer, options)
    print(f"{'loader, whole batches':<28}{'wall us':>12}{'records/s':>12}")
    best = 0.0
    for cache_mib, name in ((0, "read and decode"), (4096, "kept in memory")):
        for threads in sorted(set(options.threads)):
            rate = loading(source(cache_mib), options.batch_size, threads, bool(cache_mib))
            line(f"{name}, {threads} threads", 1e6 / rate)
            best = max(best, rate) if not cache_mib else best
    print(verdict(best, options.step_images_per_second))


def stages(
    records: shards.Records,
    source: loader.Source,
    tokenizer: tokenizers.Tokenizer,
    options: argparse.Namespace,
) -> None:
    some = [int(i) for i in np.random.default_rng(0).permutation(len(records))[:256]]
    stored = {i: records.features(i) for i in some}
    images = {i: stored[i]["image"].bytes_list.value[0] for i in some}
    texts = {i: shards.text(stored[i], SECTIONS) for i in some}
    line("read and parse", per_record(lambda i: records.features(i), some))
    line("decode PNG", per_record(lambda i: np.array(Image.open(io.BytesIO(images[i]))), some))
    line("choose the sections", per_record(lambda i: shards.text(stored[i], SECTIONS), some))
    line("tokenize", per_record(lambda i: tokenizer.encode([texts[i]], options.tokens), some))
    line("all of it", per_record(lambda i: source.take(np.array([i])), some))


def per_record(work: Callable[[int], object], indices: list[int]) -> float:
    """Microseconds of processor time for one call; wall time would include other programs."""
    calls, start = 0, time.process_time()
    while time.process_time() - start < SECONDS / 2:
        for index in indices:
            work(index)
        calls += len(indices)
    return (time.process_time() - start) / calls * 1e6


def loading(source: loader.Source, batch_size: int, threads: int, warm: bool) -> float:
    """Records a second from `train_loader`; with `warm`, after one epoch has filled the cache."""
    batches = loader.train_loader([source], [1.0], batch_size, seed=0, threads=threads)
    if warm:
        source.take(np.arange(len(source)))
    for _ in range(2 + 2 * threads):  # batches prepared before the clock starts
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        next(batches)
        count += batch_size
    rate = count / (time.perf_counter() - start)
    batches.close()
    return rate


def line(name: str, microseconds: float) -> None:
    print(f"  {name:<26}{microseconds:>12.0f}{1e6 / microseconds:>12.0f}")


def verdict(rate: float, step: float | None) -> str:
    """Say whether a training step of `step` images/s waits for a loader of `rate` images/s."""
    if step is None:
        return f"training would starve if its step took more than {rate:.0f} images/s"
    if rate < step:
        return (
            f"warning: training would starve: the loader gives {rate:.0f} images/s, the step takes "
            f"{step:.0f}: more data.threads, smaller stored images, or more CPU cores"
        )
    return f"training will not wait: its {step:.0f} images/s take {step / rate:.0%} of the loader"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
