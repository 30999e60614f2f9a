"""Time GLoRIA's local loss, forward and backward: a plain loop in torch and ours, in turns.

    python -m scripts.bench_local_alignment --batch 24 48 96 [--lengths drawn]
    python -m scripts.bench_local_alignment --batch 48 --devices 8

97 words of 768 dimensions, 361 regions, fp32, all cores. The torch side follows the official code:
it goes through the reports, repeats each for every image, and forms the attended regions. Each side
runs in its own process, and the two alternate. Prints a JSON line for each batch size: seconds of
each call, the ratio of the medians (above 1: we are faster), and peak memory above the inputs.

With --devices nothing is timed: our loss is compiled for a batch sharded over so many simulated
devices, and a JSON line gives the bytes that each device receives in a step.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

WORDS, REGIONS, WIDTH = 97, 361, 768


def inputs(batch: int, lengths: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regions, words, and the number of real words of each report."""
    rng = np.random.default_rng(0)
    regions, words = (
        rng.standard_normal((batch, n, WIDTH), np.float32) / WIDTH**0.25 for n in (REGIONS, WORDS)
    )
    drawn = rng.integers(10, WORDS + 1, batch)
    return regions, words, drawn if lengths == "drawn" else np.full(batch, WORDS)


def torch_call(batch: int, lengths: str):
    import torch

    from scripts.torch_methods import local_loss

    regions, words, counts = inputs(batch, lengths)
    v, t = (torch.from_numpy(x.swapaxes(1, 2).copy()).requires_grad_() for x in (regions, words))

    def call() -> float:
        loss = local_loss(v, t, counts.tolist())
        torch.autograd.grad(loss, (v, t))
        return float(loss.detach())

    return call


def our_call(batch: int, lengths: str):
    import jax
    import jax.numpy as jnp

    from medsyn_jax.objectives.gloria import local_loss

    regions, words, counts = inputs(batch, lengths)
    mask = np.arange(WORDS) < counts[:, None]
    args = jax.device_put((jnp.asarray(regions), jnp.asarray(words), jnp.asarray(mask)))
    step = jax.jit(jax.value_and_grad(lambda *args: local_loss(*args)[0], (0, 1)))
    compiled = step.lower(*args).compile()
    return lambda: float(jax.block_until_ready(compiled(*args))[0])


def collectives(batch: int, devices: int, lengths: str) -> dict[str, int]:
    """Bytes that each device receives in one forward and backward pass, by kind of collective."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax
    from jax.sharding import PartitionSpec as P

    from medsyn_jax.core.mesh import make_mesh
    from medsyn_jax.objectives.gloria import local_loss

    mesh = make_mesh()
    regions, words, counts = inputs(batch, lengths)
    rows = jax.sharding.NamedSharding(mesh, P(mesh.axis_names))
    args = jax.device_put((regions, words, np.arange(WORDS) < counts[:, None]), rows)
    step = jax.value_and_grad(lambda *args: local_loss(*args, mesh=mesh)[0], (0, 1))
    placed = jax.jit(step, out_shardings=((None, (rows, rows))))
    return received(placed.lower(*args).compile().as_text(), devices)


def received(hlo: str, devices: int) -> dict[str, int]:
    """Bytes that each device receives, by kind of collective in the compiled program `hlo`.

    An all-gather delivers all parts but the device's own, a reduce-scatter as many parts as there
    are other devices, an all-reduce both. Raises ValueError for a collective within a loop, whose
    number of iterations is not known here.
    """
    sizes = {"f32": 4, "bf16": 2, "pred": 1, "s32": 4}
    totals, entry = {}, False
    for line in hlo.splitlines():
        entry = line.startswith("ENTRY") or (entry and not line.startswith("}"))
        call = re.search(r"= (.*?) (all-gather|reduce-scatter|all-reduce|all-to-all)\(", line)
        if call is None:
            continue
        if not entry:
            raise ValueError(f"in a loop: {line.strip()[:80]}")
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", call[1])
        size = sum(sizes[t] * int(np.prod([int(n) for n in d.split(",") if n])) for t, d in shapes)
        share = (devices - 1) / devices
        times = {"reduce-scatter": devices - 1, "all-reduce": 2 * share}.get(call[2], share)
        totals[call[2]] = totals.get(call[2], 0) + round(times * size)
    return totals


def one_side(side: str, batch: int, lengths: str, repeats: int) -> None:
    call = {"torch": torch_call, "ours": our_call}[side](batch, lengths)
    before, seconds, loss = _resident(), [], 0.0
    for _ in range(repeats + 1):
        began = time.perf_counter()
        loss = call()
        seconds.append(time.perf_counter() - began)
    kept = [round(s, 3) for s in seconds[1:]]
    print(json.dumps({"seconds": kept, "loss": loss, "peak_mib": _peak() - before}))


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[24, 48, 96])
    parser.add_argument("--lengths", choices=("full", "drawn"), default="full")
    parser.add_argument("--repeats", type=int, default=1, help="timed calls in each process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each side")
    parser.add_argument("--devices", type=int, default=0, help="simulated; prints bytes")
    parser.add_argument("--side", choices=("torch", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return one_side(args.side, args.batch[0], args.lengths, args.repeats)
    for batch in args.batch if args.devices else ():
        moved = collectives(batch, args.devices, args.lengths)
        print(json.dumps({"batch": batch, "devices": args.devices, "bytes": moved}))
    for batch in () if args.devices else args.batch:
        row: dict = {"batch": batch, "lengths": args.lengths}
        for side in ("torch", "ours") * args.turns:
            command = [sys.executable, "-m", "scripts.bench_local_alignment", "--side", side]
            command += ["--batch", str(batch), "--lengths", args.lengths]
            command += ["--repeats", str(args.repeats)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            result = json.loads(done.stdout.splitlines()[-1])
            kept = row.setdefault(side, {"seconds": [], "peak_mib": 0})
            kept["seconds"] += result["seconds"]
            kept["loss"] = result["loss"]
            kept["peak_mib"] = round(max(kept["peak_mib"], result["peak_mib"]))
        medians = [statistics.median(row[side]["seconds"]) for side in ("torch", "ours")]
        print(json.dumps(row | {"ratio": round(medians[0] / medians[1], 2)}), flush=True)


if __name__ == "__main__":
    main()
