"""Measure how many reports a second this checkout and another one read, in turns.

    python scripts/bench_reports.py --against DIR [--rounds 5] [--random 10000]

Prints a line for each checkout, and the ratio of their rates (above 1: this checkout is faster).
Each side runs in its own process. It finds and cleans the sections and selects the text for a model
in 300 phantom reports and 2,000 random mixtures of head lines of MIMIC-CXR. Each side then reads
--random reports of up to 100 kB under random heads and reports the slowest; a report that takes
more than a second of processor time is abandoned and counted.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
LIMIT_S = 1.0
SENTENCES = """There is no focal consolidation, pleural effusion or pneumothorax.
The\n cardiomediastinal silhouette is normal.
Compared to ___, the lungs are\n clear.
The ET tube tip is 4.5 cm above the carina.
Mild pulmonary edema has\n improved; a small left effusion persists.
Dr. ___ was paged at 3:15 p.m. on ___.
1. Right lower lobe opacity, likely atelectasis.
No displaced rib fracture.""".replace("\\n", "\n").split(".\n")
HEADS = (
    ("EXAMINATION:  CHEST (PA AND LAT)", "EXAM:  CHEST RADIOGRAPH", ""),
    ("INDICATION:  ___F with cough // eval", "HISTORY:  Fever.", "REASON FOR EXAM:  Pain.", ""),
    ("TECHNIQUE:  Chest PA and lateral", "COMPARISON:  ___.", ""),
)
FINDINGS = ("FINDINGS:", "CHEST, TWO VIEWS:", "PORTABLE AP CHEST RADIOGRAPH:", "REPORT:", "")
IMPRESSIONS = ("IMPRESSION:", "CONCLUSION:", "Impression:", "IMPRESSION AND RECOMMENDATION:", "")
PIECES = ("FINDINGS: ", "IMPRESSION:\n", "NOTE: ", "COMMENT:\n", "a. ", "lungs ", "___ ", "[** ")
PIECES += ("\n \n", "1. ", "(", ".", ",", " ", "Dr. ", "A")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", type=Path, help="the other checkout of this repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random", type=int, default=10_000, help="reports under random heads")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(rate() if options.side == "rate" else slowest(options.random)))
        return
    sides = {"here": HERE} | ({"there": options.against.resolve()} if options.against else {})
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, root in sides.items():
            rates[name].append(run(root, "rate", options.random))
    for name, root in sides.items():
        slow, given_up, failed = run(root, "slowest", options.random)
        print(
            f"{name}: {statistics.median(rates[name]):,.0f} reports/s; of {options.random:,} under "
            f"random heads the slowest took {1e3 * slow:.0f} ms, "
            f"{given_up} were given up, {failed} ended in an error"
        )
    if options.against:
        pairs = zip(rates["here"], rates["there"], strict=True)
        ratios = sorted(here / there for here, there in pairs)
        print(f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def run(root: Path, side: str, count: int):
    command = [sys.executable, __file__, "--side", side, "--random", str(count)]
    result = subprocess.run(
        command, env={"PYTHONPATH": str(root)}, check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout)


def rate() -> float:
    """Reports per second of processor time."""
    from medsyn_jax.phantom import study as phantom

    texts = [phantom.study(0, i, 0, 32).report for i in range(300)] + mixtures(2000)
    start = time.process_time()
    for text in texts:
        read(text)
    return len(texts) / (time.process_time() - start)


def mixtures(count: int) -> list[str]:
    draw, texts = random.Random(0), []
    for _ in range(count):
        lines = ["FINAL REPORT", *(draw.choice(heads) for heads in HEADS)]
        for heads, most in ((FINDINGS, 6), (IMPRESSIONS, 3)):
            some = draw.choices(SENTENCES, k=draw.randint(1, most))
            lines += [draw.choice(heads), ".  ".join(some) + "."]
        text = "".join(f" {line}\n \n" for line in lines if line)
        texts.append(text if draw.random() < 0.9 else " ".join(text.split()))
    return texts


def read(text: str) -> str:
    from medsyn_jax.data.text import reports

    sections = reports.sections(text)
    findings, impression = (reports.clean(sections.get(n, "")) for n in ("findings", "impression"))
    return reports.select_text(findings, impression, text, ("findings", "impression"))


def slowest(count: int) -> tuple[float, int, int]:
    """Processor seconds of the slowest report; numbers of reports abandoned and failed."""
    signal.signal(signal.SIGPROF, _give_up)
    most, given_up, failed, draw = 0.0, 0, 0, random.Random(0)
    for _ in range(count):
        few = draw.choices(PIECES, k=draw.randint(1, 4))
        size = int(10 ** draw.uniform(2, 5))
        text = "".join(draw.choices(few, k=size // max(1, len("".join(few)) // len(few))))[:size]
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        try:
            read(text)
        except TimeoutError:
            given_up += 1
        except KeyError:
            failed += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        most = max(most, time.process_time() - start)
    return most, given_up, failed


def _give_up(*_) -> None:
    raise TimeoutError


if __name__ == "__main__":
    main()
