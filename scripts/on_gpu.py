"""Measure speed and parity on one GPU, in at most eight minutes.

    python scripts/on_gpu.py              on one GPU: JSON at the end, and in --out after every part
    python scripts/on_gpu.py --smoke      all parts at toy sizes, on CPU too
    python scripts/on_gpu.py --compile    compile the programs for an H100 that need not be present

Needs JAX, Flax, Optax, PyTorch and transformers. Each part runs in its own process: JAX's parts one
after the other, PyTorch's beside them; a lock lets only one measure at a time. A part that fails or
runs out of time gets a row with `error`, and the other parts go on. Seconds are medians of repeated
synchronous calls after warm-up. MFU is relative to 989 TFLOP/s. per_s of a training step counts
pairs. --compile needs jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cudnn-cu13, and in --target a
description of the chip from XLA's repository: xla/backends/gpu/target_config/specs. It prints a
JSON line for each program with the memory that the program needs.
"""

import argparse
import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

PEAK_TFLOPS = 989  # of an H100 SXM, dense bf16
BUDGET_S = 465
BATCH, SMALL = 16, 8  # of images
LOCAL = (48, 128, 256, 512)
METHODS = ("gloria", "convirt", "mgca")
# Parts that run one after the other, by the device or library that they use.
LANES = {
    "jax": ("step", "image", *METHODS, "local", "image_all_guided", "step_small"),
    "torch": ("torch_diffusion", *(f"torch_{name}" for name in METHODS), "torch_local"),
    "cpu": ("tflop", "parity"),
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the lock under which one part at a time measures."""
    with open(os.environ["ON_GPU_LOCK"], "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    time.sleep(0.2)  # lets a waiting part take the lock


def report(row: str, figures: dict[str, Any]) -> None:
    print(json.dumps({"row": row, **figures}), flush=True)


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def figures(times: list[float], count: int, peak: int | None, **more: Any) -> dict[str, Any]:
    median = statistics.median(times)
    gib = None if peak is None else round(peak / 2**30, 3)
    spread = {"seconds": round(median, 5), "fastest": round(min(times), 5), "repeats": len(times)}
    return {"batch": count, **spread, "per_s": round(count / median, 2), "peak_gib": gib, **more}


def run_program(row: str, program: Any, count: int, repeats: int) -> None:
    """Compile the program, time its calls, and report."""
    import jax

    from scripts.programs import filled

    device = jax.devices()[0]
    with alone():
        began = time.perf_counter()
        args = jax.device_put(filled(program.args), device)
        donated = (0,) if program.donated else ()
        compiled = jax.jit(program.f, donate_argnums=donated).lower(*args).compile()
        compile_s = time.perf_counter() - began

        def call() -> None:
            nonlocal args
            out = jax.block_until_ready(compiled(*args))
            args = (out[0], *args[1:]) if program.donated else args

        seconds(call, 2)
        times = seconds(call, repeats)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    report(row, figures(times, count, peak, compile_s=round(compile_s, 1)))


def jax_part(name: str, toy: bool) -> None:
    from scripts import programs

    many, few = (2, 1) if toy else (BATCH, SMALL)
    repeats = 2 if toy else 20
    if name in METHODS:
        count = programs.method_config(name, toy).data.batch_size
        return run_program(name, programs.method(name, toy), count, repeats)
    if name == "local":
        for batch in (4, 6) if toy else LOCAL:
            run_program(f"local {batch}", programs.local(batch, toy), batch, 2 if toy else 5)
        return None
    if name.startswith("step"):
        batch = few if name == "step_small" else many
        return run_program(name, programs.guided_step(batch, toy), batch, repeats)
    program = programs.image(many, toy, default=name == "image")
    return run_program(name, program, many, 2 if toy else 3)


def tflop_part(name: str, toy: bool) -> None:
    """Report the TFLOP of the other rows, by name, for a whole batch, as lowered in float32."""
    import jax.numpy as jnp

    from scripts import programs

    unet, vae = ("TOY_UNET", "TOY_VAE") if toy else ("UNET", "VAE")
    configs = getattr(programs, unet), getattr(programs, vae)
    cost, many = programs.image_tflop(*configs, 8 if toy else 64), 2 if toy else BATCH
    rows = {"step": 2 * many * cost["full"], "image": many * cost["default"]}
    rows |= {"step_small": 2 * (1 if toy else SMALL) * cost["full"]}
    rows |= {"image_all_guided": many * cost["all guided"]}
    for batch in (4, 6) if toy else LOCAL:
        rows[f"local {batch}"] = programs.local_tflop(batch, toy)
    report(name, {k: round(v, 6) for k, v in rows.items()})
    for method in METHODS:
        # A loop body counts once, so GLoRIA's loop over reports is counted by `local_tflop`.
        settings = {"memory_mib": 0} if method == "gloria" else {}
        program = programs.method(method, toy, jnp.float32, **settings)
        rows[method] = programs.tflop(program.f, *program.args)
        if method == "gloria":
            rows[method] += programs.local_tflop(program.args[1]["ids"].shape[0], toy)
        report(name, {k: round(v, 6) for k, v in rows.items()})


def parity_part(name: str, toy: bool) -> None:
    """Compare small networks with the same weights on the device and on the host.

    Reports |a - b| / |b| of the worst output, and the largest difference relative to the largest
    value. The reference is the host in float32. bfloat16 runs on both sides, so that rounding can
    be told from a fault.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from scripts.programs import parity_cases

    host, device = jax.local_devices(backend="cpu")[0], jax.devices()[0]

    def computed(f: Callable, args: tuple, where: Any, dtype: Any) -> list[np.ndarray]:
        with alone(), jax.default_matmul_precision("highest"):
            outputs = jax.jit(f(dtype))(*jax.device_put(args, where))
        return [np.asarray(x, np.float64) for x in jax.tree.leaves(outputs)]

    def errors(a: list[np.ndarray], b: list[np.ndarray]) -> dict[str, float]:
        pairs = [(x - y, y) for x, y in zip(a, b, strict=True) if np.abs(y).max() > 0]
        of_norm = max(np.linalg.norm(e) / np.linalg.norm(y) for e, y in pairs)
        largest = max(np.abs(e).max() / np.abs(y).max() for e, y in pairs)
        return {"relative": float(f"{of_norm:.3g}"), "largest": float(f"{largest:.3g}")}

    for case, (f, args) in parity_cases().items():
        truth = computed(f, args, host, jnp.float32)
        of_dtype = {"float32": errors(computed(f, args, device, jnp.float32), truth)}
        for side, where in (("", device), (" on CPU", host)):
            of_dtype[f"bfloat16{side}"] = errors(computed(f, args, where, jnp.bfloat16), truth)
        report(f"{name} {case}", of_dtype)


def measure_torch(row: str, call: Callable[[], Any], count: int, repeats: int, **more: Any) -> None:
    """Time the calls alone; the first call, which compiles, may run beside other parts."""
    import torch

    cuda = torch.cuda.is_available()

    def waited() -> None:
        call()
        if cuda:
            torch.cuda.synchronize()

    began = time.perf_counter()
    waited()
    compile_s = time.perf_counter() - began
    with alone():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds(waited, 2)
        times = seconds(waited, repeats)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    report(row, figures(times, count, peak, compile_s=round(compile_s, 1), **more))


def torch_part(name: str, toy: bool) -> None:
    import torch

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "torch_diffusion":
        from scripts import torch_unet

        with torch.inference_mode():
            batch = 2 if toy else BATCH
            step, images = torch_unet.calls(batch, toy, device)
            measure_torch("torch_step", step, batch, 2 if toy else 20)
            measure_torch("torch_image_all_guided", images, batch, 2 if toy else 3)
        return None
    from scripts import programs, torch_methods

    if name == "torch_local":
        batch, sizes = (4, (9, 6, 16)) if toy else (LOCAL[0], (361, 97, 768))
        shapes = ((batch, sizes[2], n) for n in sizes[:2])
        v, t = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
        v, t = v.requires_grad_(), t.requires_grad_()

        def call() -> None:
            torch.autograd.grad(torch_methods.local_loss(v, t, [sizes[1]] * batch), (v, t))

        return measure_torch(f"torch_local {batch}", call, batch, 2 if toy else 5)
    method = name.removeprefix("torch_")
    config = programs.method_config(method, toy)
    batch = programs.method_batch(config, config.data.batch_size)
    step = torch_methods.method_step(method, config, batch, device, bf16=True)
    return measure_torch(name, step, config.data.batch_size, 2 if toy else 20)


def device_part(name: str, toy: bool) -> None:
    import jax

    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    report(name, {"platform": device.platform, "kind": device.device_kind, "bytes_limit": memory})


def run_part(name: str, toy: bool) -> None:
    kinds = {"tflop": tflop_part, "parity": parity_part, "device": device_part}
    of_lane = torch_part if name in LANES["torch"] else jax_part
    kinds.get(name, of_lane)(name, toy)


class Results:
    """Rows of all parts, written to a file whenever a row arrives."""

    def __init__(self, path: Path):
        self.path, self.lock, self.began = path, threading.Lock(), time.monotonic()
        self.data: dict[str, Any] = {"versions": _versions(), "rows": {}}

    def add(self, row: str, figures: dict[str, Any]) -> None:
        with self.lock:
            self.data["rows"].setdefault(row, {}).update(figures)
            self.data["total_s"] = round(time.monotonic() - self.began, 1)
            self._derive()
            self.path.write_text(json.dumps(self.data, indent=2) + "\n")

    def _derive(self) -> None:
        """Add MFU where the FLOPs are known (PyTorch's by ours), and the ratio to PyTorch."""
        rows = self.data["rows"]
        for name, row in rows.items():
            tflop = rows.get("tflop", {}).get(name.removeprefix("torch_"))
            if tflop and "seconds" in row:
                row["tflop"] = tflop
                row["mfu"] = round(tflop / row["seconds"] / PEAK_TFLOPS, 5)
            ours = rows.get(name.removeprefix("torch_"), {})
            if name.startswith("torch_") and "seconds" in row and "seconds" in ours:
                ours["ratio_to_torch"] = round(row["seconds"] / ours["seconds"], 3)


def _versions() -> dict[str, str]:
    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    return {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}}


def start(name: str, args: argparse.Namespace, results: Results, left: float) -> None:
    """Run one part in its own process; add its rows as they arrive, or its error."""
    if left < 5:
        return results.add(name, {"error": "left out: no time left"})
    env = os.environ | {"PYTHONUNBUFFERED": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if name in ("tflop", *LANES["torch"]):  # leaves the GPU to torch
        env["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, "--part", name] + ["--smoke"] * args.smoke
    with tempfile.TemporaryFile("w+") as errors:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=env, stdout=pipe, stderr=errors, text=True)
        timer = threading.Timer(left, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith('{"row"'):
                row = json.loads(line)
                results.add(row.pop("row"), row)
        code = process.wait()
        late = not timer.is_alive()
        timer.cancel()
        if code:
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()] or ["no message"]
            reason = "stopped: no time left" if late else lines[-1][-500:]
            print("".join(f"{name}: {line}\n" for line in lines[-15:]), end="", file=sys.stderr)
            results.add(name, {"error": reason})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    results, deadline = Results(args.out), time.monotonic() + args.budget
    with tempfile.NamedTemporaryFile() as lock:
        os.environ["ON_GPU_LOCK"] = lock.name
        start("device", args, results, args.budget)

        def lane(names: tuple[str, ...]) -> None:
            for name in names:
                if not args.parts or name in args.parts:
                    start(name, args, results, deadline - time.monotonic())

        threads = [threading.Thread(target=lane, args=(names,)) for names in LANES.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results.data


def compile_all(args: argparse.Namespace) -> None:
    """Print a line for each program: memory on an H100, and calls of cuDNN's attention."""
    flags = " --xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np
    from jax.experimental import topologies

    from scripts import programs

    text, where = args.target.read_text(), {"topology": "1x1x1", "topology_name": "h100"}
    chip = topologies.get_topology_desc(platform="cuda", target_config=text, **where)
    here = jax.sharding.SingleDeviceSharding(chip.devices[0])
    many, few = (2, 1) if args.smoke else (BATCH, SMALL)
    makers: dict[str, Callable] = {
        "step_small": lambda: programs.guided_step(few, args.smoke),
        "step": lambda: programs.guided_step(many, args.smoke),
        "image": lambda: programs.image(many, args.smoke, True),
        "image_all_guided": lambda: programs.image(many, args.smoke, False),
    }
    for name in METHODS:
        makers[name] = lambda name=name: programs.method(name, args.smoke)
    for batch in (4,) if args.smoke else LOCAL:
        makers[f"local {batch}"] = lambda batch=batch: programs.local(batch, args.smoke)
    for name, make in makers.items():
        if args.parts and name.split()[0] not in args.parts:
            continue
        program, began = make(), time.monotonic()

        def placed(x: Any) -> Any:
            dtype = jax.dtypes.canonicalize_dtype(np.dtype(x.dtype))
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=here)

        donated = (0,) if program.donated else ()
        jitted = jax.jit(program.f, donate_argnums=donated, out_shardings=here)
        compiled = jitted.lower(*jax.tree.map(placed, program.args)).compile()
        sizes, row = compiled.memory_analysis(), {"row": name}
        row["gb_temporaries"] = round(sizes.temp_size_in_bytes / 1e9, 3)
        row["gb_arguments"] = round(sizes.argument_size_in_bytes / 1e9, 3)
        row["gb_peak"] = round(sizes.peak_memory_in_bytes / 1e9, 3)
        row["cudnn_attention"] = compiled.as_text().count("__cudnn$fmha")
        print(json.dumps(row | {"compile_s": round(time.monotonic() - began, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--compile", action="store_true", help="compile for an H100, run nothing")
    parser.add_argument("--target", type=Path, default=Path("h100_sxm.txtpb"), help="of the chip")
    parser.add_argument("--parts", nargs="+", default=[], help="run these parts alone")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts")
    parser.add_argument("--out", type=Path, default=Path("on_gpu.json"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return run_part(args.part, args.smoke)
    if args.compile:
        return compile_all(args)
    return print(json.dumps(measure(args), indent=2))


if __name__ == "__main__":
    main()
