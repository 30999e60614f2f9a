"""Measure what stored sets cost a run: the start of a pre-training, and the memory of a probe.

    python -m scripts.bench_sets start [--other CHECKOUT] [--records 10000] [--rounds 3]
    python -m scripts.bench_sets memory [--other CHECKOUT] [--records 1000 10000]

`start` prints the processor seconds from the command to the first training step of a ConVIRT run on
three sets of so many records, for this checkout and another one in turns, and the ratio of the
medians. The cost of the imports and of compilation is printed beside it, as that of a run on three
sets of 30 records. `memory` prints the peak of `classify` on sets of so many records: the resident
memory, and its part that is no file. The images are noise, which PNG hardly compresses.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
FEW = 30  # records of a set whose reading costs nothing
MAIN = (sys.executable, "-m", "medsyn_jax.main")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("start", "memory"))
    parser.add_argument("--other", type=Path, help="another checkout of this repository")
    parser.add_argument("--records", type=int, nargs="+", help="records of a set")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each checkout")
    options = parser.parse_args()
    sides = {"here": HERE} | ({"other": options.other.resolve()} if options.other else {})
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "start":
            start(Path(folder), sides, (options.records or [10000])[0], options.rounds)
        else:
            memory(Path(folder), sides, options.records or [1000, 10000])


def start(root: Path, sides: dict[str, Path], records: int, rounds: int) -> None:
    sets = {
        count: [ingested(root, f"{count}-{i}", count, size=256, first=i * count) for i in range(3)]
        for count in (FEW, records)
    }
    seconds: dict[tuple[str, int], list[float]] = {}
    for round_ in range(rounds + 1):  # the first fills the caches
        for side in sorted(sides, reverse=bool(round_ % 2)):
            for count, folders in sets.items():
                workdir = root / f"run-{side}-{count}-{round_}"
                spent = until_first_step(sides[side], folders, workdir, root)
                if round_:
                    seconds.setdefault((side, count), []).append(spent)
    print(f"processor seconds to the first step   3 x {FEW}   3 x {records}")
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for side in sides:
        print(f"{side:36} {medians[side, FEW]:8.1f} {medians[side, records]:10.1f}")
    if "other" in sides:
        whole = medians["here", records] / medians["other", records]
        alone = [medians[side, records] - medians[side, FEW] for side in ("here", "other")]
        print(f"ratio of the whole {whole:.3f}, of what the records add {alone[0] / alone[1]:.3f}")


def until_first_step(checkout: Path, folders: list[Path], workdir: Path, root: Path) -> float:
    """Processor seconds of a run, which is ended after its first step."""
    fields = {
        "data.sources": tuple(map(str, folders)),
        "data.weights": (1.0, 1.0, 1.0),
        "data.size": 256,
        "data.tokenizer": str(root / "tokenizer") if (root / "tokenizer").exists() else "",
        "data.vocab_size": 300,
    }
    command = command_of("convirt.py:smoke", workdir, fields)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "first step done" in line:
            break
    process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.WIFEXITED(status):
        raise RuntimeError("".join(lines))
    if not (root / "tokenizer").exists():  # trained once, since that reads all texts anyway
        (workdir / "tokenizer").rename(root / "tokenizer")
    return usage.ru_utime + usage.ru_stime


def memory(root: Path, sides: dict[str, Path], counts: list[int]) -> None:
    few = ingested(root, "few", 200, size=512)
    encoder = root / "encoder"
    fields = {"data.sources": (str(few),), "data.size": 512, "data.vocab_size": 300}
    run(HERE, "convirt.py:smoke", encoder, fields)
    print("peak of classify, MiB       records   resident   no file")
    for count in counts:
        folder = ingested(root, str(count), count, size=512)
        for side, checkout in sides.items():
            fields = {"encoder.workdir": str(encoder), "data.source": str(folder)}
            fields |= {"data.batch_size": 64}
            peak = run(checkout, "classify.py:smoke", root / f"{side}-{count}" / "run", fields)
            print(f"{side:24} {count:10} {peak[0]:10.0f} {peak[1]:9.0f}", flush=True)


def command_of(config: str, workdir: Path, fields: dict) -> list[str]:
    texts = {name: x if isinstance(x, str) else repr(x) for name, x in fields.items()}
    options = [f"--config.{name}={text}" for name, text in texts.items()]
    return [*MAIN, "--config", f"configs/{config}", "--workdir", str(workdir), *options]


def run(checkout: Path, config: str, workdir: Path, fields: dict) -> tuple[float, float]:
    """Run a task and return the peaks of its memory in MiB: resident, and resident but no file."""
    command = command_of(config, workdir, fields)
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=checkout, env=environment, **output)
    peaks = (0.0, 0.0)
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        kib = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if "kB" in line}
        now = (float(kib.get("VmHWM", 0)), float(kib.get("RssAnon", 0)))
        peaks = tuple(map(max, peaks, now))
        time.sleep(0.05)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)}: status {process.returncode}")
    return peaks[0] / 1024, peaks[1] / 1024


def ingested(root: Path, name: str, count: int, size: int, first: int = 0) -> Path:
    """The shards of a set of noise, written by this checkout."""
    pictures = root / f"images-{size}"
    pictures.mkdir(exist_ok=True)
    rows = [("image", "report", "subject", "odd")]
    for i in range(count):
        path = pictures / f"{i:06d}.png"
        if not path.exists():
            rng = np.random.default_rng(i)
            blocks = rng.integers(0, 256, (size // 2, size // 2), np.uint8)
            Image.fromarray(blocks.repeat(2, 0).repeat(2, 1)).save(path, compress_level=1)
        report = f"FINDINGS: The lungs of number {first + i} are clear.\nIMPRESSION: Normal {i}."
        rows.append((str(path), report, f"p{first + i}", str(i % 2)))
    table = root / f"{name}.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    fields = {"ingest.path": str(table), "ingest.size": size}
    fields |= {"ingest.pairs.subject": "subject", "ingest.pairs.labels": ("odd",)}
    run(HERE, "ingest.py:pairs", root / f"set-{name}", fields)
    return root / f"set-{name}" / "shards"


if __name__ == "__main__":
    main()
