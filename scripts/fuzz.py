"""Feed malformed inputs to the package: each must give a sane value or a one-line error.

    python -m scripts.fuzz --seed 0 --cases 2000 [--kind texts] [--workers 2]
    python -m scripts.fuzz --seconds 60
    python -m scripts.fuzz --kind texts --seed 0 --case 17     # one case, with its traceback

A case passes if the package returns a sane value, or raises UserError, RejectedRecord or
LeftOutRecord with a message of one short line that does not mention Python's types, within a limit
of processor time that depends only on the kind. Cases run in worker processes, so a crash of a
library is a failed case, too. Prints each cause of a fault once, with the command that repeats the
case, and a table of cases by kind. Exit status 1 if there are faults. The modules
`fuzz_{sources,files,runs}.py` make the inputs of each kind and check the results.
"""

import argparse
import collections
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from medsyn_jax.core.errors import RejectedRecord, UserError
from scripts import fuzz_files, fuzz_runs, fuzz_sources
from scripts.fuzz_inputs import Fault, Kind

KINDS = {
    "texts": Kind(fuzz_sources.nothing, fuzz_sources.text_case, 52, 3),
    "tables": Kind(fuzz_sources.tables_prepare, fuzz_sources.table_case, 15, 5),
    "images": Kind(fuzz_files.images_prepare, fuzz_files.image_case, 20, 5),
    "tensors": Kind(fuzz_files.tensors_prepare, fuzz_files.tensor_case, 8, 5),
    "pipelines": Kind(fuzz_runs.pipelines_prepare, fuzz_runs.pipeline_case, 2, 20),
    "shards": Kind(fuzz_runs.shards_prepare, fuzz_runs.shard_case, 2, 20),
    "configs": Kind(fuzz_runs.configs_prepare, fuzz_runs.config_case, 1, 40),
}
LONGEST = 1000  # characters of a message
MEMORY = 6 << 30  # bytes of a worker
_PYTHON = re.compile(
    r"object (?:is|has|does|cannot|of type)|has no attribute|NoneType|unsupported operand"
    r"|positional argument|unexpected keyword|(?:list|string|index) ind(?:ex|ices)|<class "
    r"|invalid literal for|could not convert|not supported between|unhashable|Traceback"
)


class TooSlow(BaseException):
    """A case exceeds its time. Not an Exception, which decoders may catch and drop."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a case: `passed`, `refused` (UserError), `rejected` (a record) or `failed`."""

    kind: str
    number: int
    verdict: str
    ms: float = 0.0
    cause: str = ""  # the same for all faults of one cause
    detail: str = ""


def run_case(kind: str, seed: int, number: int, folder: Path) -> Outcome:
    """Run one case in a fresh `folder`, which is removed afterwards."""
    rng = random.Random(f"{kind}/{seed}/{number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    limit, began = KINDS[kind].limit_s, time.process_time()
    verdict, cause, detail = "passed", "", ""
    try:
        _limit_time(limit)
        try:
            KINDS[kind].case(rng, folder)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            most = resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    except (UserError, RejectedRecord) as error:
        verdict = "refused" if isinstance(error, UserError) else "rejected"
        if wrong := wrong_message(str(error)):
            verdict, detail = "failed", ascii(str(error))[:600]
            cause = f"{wrong} in {_place(error)}"
    except (Exception, TooSlow) as error:
        verdict, detail = "failed", "".join(traceback.format_exception(error, limit=-4))
        words = str(error).partition(":")[0] if isinstance(error, Fault) else ""
        cause = f"{type(error).__name__} {words} in {_place(error)}"
    ms = 1000 * (time.process_time() - began)
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(kind, number, verdict, ms, cause, detail)


def wrong_message(message: str) -> str:
    """Why a message is unfit for users; "" if the message is fine."""
    if not message.strip():
        return "an empty message"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in message):
        return "a message with line breaks, control characters or surrogates"
    if len(message) > LONGEST:
        return f"a message of over {LONGEST} characters"
    if found := _PYTHON.search(message):
        return f"a message that speaks of Python ({found[0]})"
    return ""


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "medsyn_jax" in Path(f.filename).parts] or frames
    return f"{Path(ours[-1].filename).name}: {ours[-1].name}"


def _limit_time(seconds: float) -> None:
    """Raise TooSlow after so much processor time; SIGXCPU later if native code does not return."""

    def too_slow(*_: object) -> None:
        raise TooSlow(f"more than {seconds} s of processor time")

    signal.signal(signal.SIGVTALRM, too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    soft = int(time.process_time() + 4 * seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _work(pipe: connection.Connection, kinds: list[str], seed: int, room: Path) -> None:
    """A worker: receives case numbers, sends outcomes, drops what the package prints."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silent, stream)
    try:
        _prepare(kinds, room)
    except BaseException:
        pipe.send(traceback.format_exc())
        raise
    pipe.send("")  # ready
    while (task := pipe.recv()) is not None:
        pipe.send(run_case(*task[:1], seed, task[1], room / "case"))


def _prepare(kinds: list[str], room: Path) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for kind in kinds:
        (room / kind).mkdir(parents=True, exist_ok=True)
        KINDS[kind].prepare(room / kind)


class Pool:
    """Workers that run cases; a worker that dies or hangs is replaced, and its case has failed."""

    def __init__(self, kinds: list[str], seed: int, count: int, room: Path):
        self.kinds, self.seed, self.room = kinds, seed, room
        self.context = multiprocessing.get_context("spawn")
        self.started = 0
        self.workers = [self._start() for _ in range(count)]
        for worker in self.workers:
            self._wait(worker)

    def _start(self) -> tuple:
        ours, theirs = self.context.Pipe()
        room = self.room / str(self.started)
        self.started += 1
        process = self.context.Process(target=_work, args=(theirs, self.kinds, self.seed, room))
        process.start()
        theirs.close()
        return process, ours

    def _wait(self, worker: tuple) -> None:
        if problem := worker[1].recv():
            raise SystemExit(f"a worker could not prepare its inputs:\n{problem}")

    def run(self, tasks: Iterator[tuple[str, int]]) -> Iterator[Outcome]:
        """Yield the outcomes of all tasks (kind, number) as they arrive."""
        busy = {}
        for worker in list(self.workers):
            self._give(worker, tasks, busy)
        while busy:
            pipes = {worker[1]: worker for worker in busy}
            for pipe in connection.wait(list(pipes), timeout=5.0):
                worker = pipes[pipe]
                task = busy.pop(worker)[0]
                try:
                    yield pipe.recv()
                except EOFError:
                    yield self._lost(worker, task)
                    worker = self.workers[-1]
                self._give(worker, tasks, busy)
            for worker, ((kind, _), began) in busy.items():
                if time.monotonic() - began > 30 + 20 * KINDS[kind].limit_s:
                    worker[0].kill()  # it hangs: reported in the next iteration

    def _give(self, worker: tuple, tasks: Iterator[tuple[str, int]], busy: dict) -> None:
        if (task := next(tasks, None)) is not None:
            worker[1].send(task)
            busy[worker] = task, time.monotonic()

    def _lost(self, worker: tuple, task: tuple[str, int]) -> Outcome:
        process = worker[0]
        process.join()
        died = signal.Signals(-process.exitcode).name if process.exitcode < 0 else "an exit"
        self.workers.remove(worker)
        self.workers.append(self._start())
        self._wait(self.workers[-1])
        return Outcome(*task, "failed", cause=f"the process ended by {died}")

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.send(None)
            process.join()


def _tasks(kinds: list[str], seed: int, cases: int, seconds: float) -> Iterator[tuple[str, int]]:
    """Yield (kind, number): kinds in proportion to their weights, each with its own numbers."""
    rng, counts, began = random.Random(seed), dict.fromkeys(kinds, 0), time.monotonic()
    weights = [KINDS[kind].weight for kind in kinds]
    while sum(counts.values()) < cases if not seconds else time.monotonic() - began < seconds:
        kind = rng.choices(kinds, weights)[0]
        yield kind, counts[kind]
        counts[kind] += 1


def _table(outcomes: list[Outcome]) -> str:
    lines = [f"{'kind':<10}{'cases':>8}{'passed':>8}{'refused':>8}{'rejected':>9}{'failed':>8}"]
    lines[0] += f"{'mean ms':>9}{'slowest ms':>12}"
    for kind in (*sorted({o.kind for o in outcomes}), "all"):
        own = [o for o in outcomes if kind in (o.kind, "all")]
        counts = collections.Counter(o.verdict for o in own)
        line = f"{kind:<10}{len(own):>8}{counts['passed']:>8}{counts['refused']:>8}"
        line += f"{counts['rejected']:>9}{counts['failed']:>8}"
        times = [o.ms for o in own]
        lines.append(f"{line}{sum(times) / len(own):>9.1f}{max(times):>12.0f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0, help="run time, instead of --cases")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="default: all")
    parser.add_argument("--case", type=int, help="run this case alone; needs one --kind")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    kinds = args.kind or list(KINDS)
    outcomes: list[Outcome] = []
    causes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        room = Path(name)
        if args.case is not None:
            _prepare(kinds[:1], room)
            print(run_case(kinds[0], args.seed, args.case, room / "case"))
            return 0
        pool = Pool(kinds, args.seed, args.workers, room)
        for outcome in pool.run(_tasks(kinds, args.seed, args.cases, args.seconds)):
            outcomes.append(outcome)
            if outcome.verdict == "failed":
                cause = f"{outcome.kind}: {outcome.cause}"
                causes[cause] += 1
                if causes[cause] == 1:
                    alone = f"--kind {outcome.kind} --seed {args.seed} --case {outcome.number}"
                    print(f"FAULT {cause}\n  alone: {alone}\n{outcome.detail}", flush=True)
        pool.close()
    print(_table(outcomes))
    for cause, count in causes.most_common():
        print(f"{count:>6} x {cause}")
    return 1 if causes else 0


if __name__ == "__main__":
    sys.exit(main())
