"""Kill a generation with SIGKILL at many moments; check that its set equals an uninterrupted one.

    python -m scripts.chaos_generate --kills 20 --images 2000
    python -m scripts.chaos_generate --kills 20 --images 2000 --devices 8

Runs `configs/generate.py:smoke` on prompts of the phantom with a tiny random pipeline, once without
kills on one device, and once with kills on --devices simulated devices; the killed run is started
again after each kill until it is done. Prints one JSON line with what the kills hit and the
differences between the files and records of the two sets: no record may be missing or occur twice,
and every pixel must be equal. Exit status 1 if anything differs.

The moments are drawn from --seed: while the run starts (imports, prompts, compilation), while it
draws images, or at the end (metadata, data card, contact sheet).
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from medsyn_jax.data.store import shards
from scripts import random_pipeline
from scripts.chaos import LIMIT_S, ROOT, Failed, code, environment, moments

START, END = 0.25, 0.9  # shares of the run: up to the first shard, and from the last shard on
A_SHARD = 48  # records


@dataclass
class Run:
    """One generation in its own workdir, started as often as needed."""

    workdir: Path
    images: int
    devices: int
    child: subprocess.Popen | None = None
    starts: list[Path] = field(default_factory=list)

    def start(self) -> None:
        fields = {"pipeline": self.workdir.parent / "pipeline", "records_per_shard": A_SHARD}
        fields |= {"batch_per_device": 8, "data.limit": self.images}
        fields |= {"ingest.phantom.subjects": -(-self.images // 2), "ingest.workers": 1}
        command = [sys.executable, "-m", "medsyn_jax.main", "--config=configs/generate.py:smoke"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        self.starts.append(self.workdir.with_name(f"{self.workdir.name}-{len(self.starts)}.log"))
        env = environment(self.workdir.parent, self.devices)
        with self.starts[-1].open("w") as output:
            streams = {"stdout": output, "stderr": output}
            command.append(f"--workdir={self.workdir}")
            self.child = subprocess.Popen(command, cwd=ROOT, env=env, **streams)

    def output(self) -> str:
        return self.starts[-1].read_text(errors="replace")

    def alive(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def written(self) -> int:
        """Shards under their final names."""
        return len(list((self.workdir / "shards").glob("*.array_record-*")))

    def wait(self, reached, seconds: float = LIMIT_S) -> None:
        deadline = time.monotonic() + seconds
        while self.alive() and not reached() and time.monotonic() < deadline:
            time.sleep(0.002)

    def finish(self) -> None:
        """Wait for the end; raise Failed unless the exit status is 0."""
        assert self.child is not None
        self.wait(lambda: False, 10 * LIMIT_S)
        if self.child.poll() != 0:
            raise Failed(f"exit status {self.child.poll()}:\n{self.output()[-3000:]}")

    def kill(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()


def unbroken(run: Run) -> tuple[float, float, float]:
    """Run to the end; return seconds to the first shard, for a shard, and after the last."""
    began = time.monotonic()
    run.start()
    run.wait(lambda: run.written() > 0)
    first = time.monotonic()
    last = [first, run.written()]

    def all_there() -> bool:
        if run.written() > last[1]:
            last[:] = time.monotonic(), run.written()
        return False

    run.wait(all_there, 10 * LIMIT_S)
    run.finish()
    a_shard = (last[0] - first) / max(run.written() - 1, 1)
    return first - began, a_shard, time.monotonic() - last[0]


def broken(run: Run, kills: list[float], total: int, times: tuple[float, float, float]) -> list:
    """Run to the end with a kill at each of the moments; return what each kill hit."""
    prepared, a_shard, ending = times
    rng, hit = random.Random(total), []
    for moment in kills:
        run.start()
        began = time.monotonic()
        if moment < START:
            run.wait(lambda: False, moment / START * prepared)
        elif moment < END:
            share = (moment - START) / (END - START)
            target = min(total, max(1 + int(share * (total - 1)), run.written() + 1))
            run.wait(lambda least=target: run.written() >= least)
            time.sleep(rng.random() * 2 * a_shard)
        else:
            run.wait(lambda: run.written() >= total)
            time.sleep((moment - END) / (1 - END) * ending)
        if run.alive():
            after = round(time.monotonic() - began, 2)
            hit.append({"moment": round(moment, 2), "after_s": after, "shards": run.written()})
        run.kill()
        assert run.child is not None
        if run.child.returncode not in (0, -signal.SIGKILL):
            raise Failed(f"exit status {run.child.returncode} before the kill:\n{run.output()}")
    run.start()
    run.finish()
    return hit


def differences(a: Run, b: Run, images: int) -> list[str]:
    """Differences of the second set from the first, and faults of either."""
    one, other = (
        {
            path.relative_to(r.workdir).as_posix(): path.read_bytes()
            for path in (r.workdir / "shards").rglob("*")
            if path.is_file()
        }
        for r in (a, b)
    )
    differing = [
        f"file {name}" for name in sorted({*one, *other}) if one.get(name) != other.get(name)
    ]
    tables = [records(run.workdir / "shards") for run in (a, b)]
    for run, table in zip((a, b), tables, strict=True):
        if len(table) != images:
            differing.append(f"{run.workdir.name}: {len(table)} records instead of {images}")
    differing += [f"record {key}" for key in tables[0] if tables[0][key] != tables[1].get(key)]
    return differing


def records(folder: Path) -> dict[str, tuple]:
    """Key -> (split, pixels, labels, texts) of all records; Failed if a key occurs twice."""
    table: dict[str, tuple] = {}
    for split in shards.describe(folder)["splits"]:
        data = shards.open_split(folder, split)
        for record in map(data.__getitem__, range(len(data))):
            if record["key"] in table:
                raise Failed(f"{folder}: {record['key']} occurs twice")
            image, labels = record.pop("image"), record.pop("labels")
            table[record["key"]] = split, image.tobytes(), labels.tolist(), record
    return table


def chaos(root: Path, kills: int, images: int, devices: int = 1, seed: int = 0) -> dict:
    """Make both runs under `root`; return the result that is printed."""
    random_pipeline.write(root / "pipeline")
    whole, torn = Run(root / "unbroken", images, 1), Run(root / "broken", images, devices)
    warm = Run(root / "warm", images, devices)  # fills the compilation cache; not timed
    began, before = time.monotonic(), code()
    try:
        unbroken(whole)
        unbroken(warm)
        shutil.rmtree(warm.workdir)
        times = unbroken(warm)
        hit = broken(torn, moments(kills, seed), whole.written(), times)
    finally:
        for run in (whole, warm, torn):
            run.kill()
    if code() != before:
        raise Failed("the code was edited during the run: start again")
    differing = differences(whole, torn, images)
    return {
        "kills": len(hit),
        "hit": hit,
        "images": images,
        "shards": whole.written(),
        "devices": devices,
        "seconds": round(time.monotonic() - began, 1),
        "different": len(differing),
        "differences": differing[:5],
        "equal": not differing,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--devices", type=int, default=1, help="of the killed run, simulated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        result = chaos(root, options.kills, options.images, options.devices, options.seed)
    except Failed as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(result))
    return 0 if result["equal"] and result["kills"] == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
