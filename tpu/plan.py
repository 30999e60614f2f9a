"""Compute the time and memory that a program needs on a TPU chip, without the chip.

    pip install -e '.[tpu]'
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m tpu.plan --chip v5e --batch 8
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m tpu.plan --what local --chip v5e --batch 1024

Compiles the program ahead of time for one chip (libtpu does that on any machine) and prints a JSON
line: TFLOP and GB accessed in a step, GB of arguments and of temporaries, and the shortest time of
arithmetic and of traffic at the chip's peaks (docs/performance.md). The programs are a guided step
of a Stable Diffusion U-Net, and GLoRIA's local loss with its gradient (97 words, 361 regions, 768
dimensions). Pallas kernels count as their authors declare. If a chip's compiler refuses a kernel,
as a v3's does in bf16, XLA's own operations are compiled, and a line says so.
"""

import argparse
import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medsyn_jax.core.errors import UserError, reason
from medsyn_jax.models.diffusion import pipeline
from medsyn_jax.models.layers import split
from medsyn_jax.objectives import gloria

# Of a device: topology, peak TFLOP/s in bf16, GB/s, GB (public descriptions of the chips). A v3 has
# two devices.
CHIPS = {
    "v3": ("v3:1x1", 61.5, 450, 16),
    "v5e": ("v5e:2x2", 197, 819, 16),
    "v6e": ("v6e:2x2", 918, 1640, 32),
}
SD15 = {"cross_attention_dim": 768}
SD21 = {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
MODELS = {"sd15": SD15, "sd21": SD21}
TOKENS = 77
REGIONS, WORDS, WIDTH = 361, 97, 768


def one_chip(chip: str) -> tuple[Mesh, NamedSharding]:
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
    mesh = Mesh(np.array([device]), ("data",))
    return mesh, NamedSharding(mesh, P())


def unet_step(model: str, chip: str, batch: int, side: int) -> jax.stages.Compiled:
    """The compiled U-Net on `batch` latents with and without their text, bf16, for one chip."""
    mesh, here = one_chip(chip)
    make = pipeline.part("unet", MODELS[model], {}).make
    structure, shapes, _ = split(nnx.eval_shape(lambda: make(nnx.Rngs(0), dtype=jnp.bfloat16)))
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=here), shapes
    )

    def step(params, x, t, context):
        unet = nnx.merge(structure, params, {}, copy=True)
        return unet(jnp.concatenate([x, x]), t, context)

    width = MODELS[model]["cross_attention_dim"]
    inputs = (
        jax.ShapeDtypeStruct((batch, side, side, 4), jnp.bfloat16, sharding=here),
        jax.ShapeDtypeStruct((2 * batch,), jnp.float32, sharding=here),
        jax.ShapeDtypeStruct((2 * batch, TOKENS, width), jnp.bfloat16, sharding=here),
    )
    # Mapped over one device, as generation maps its program over all devices of a process.
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped, out_shardings=here).lower(params, *inputs).compile()


def local_loss(chip: str, batch: int) -> jax.stages.Compiled:
    """GLoRIA's local similarities, summed, with their gradient, bf16, compiled for one chip."""
    mesh, here = one_chip(chip)

    def shape(*sizes: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

    def total(regions, words, mask):
        return gloria.local_similarity(regions, words, mask, mesh=mesh).sum()

    regions, words = shape(batch, REGIONS, WIDTH), shape(batch, WORDS, WIDTH)
    step = jax.jit(jax.value_and_grad(total, (0, 1)), out_shardings=here)
    return step.lower(regions, words, shape(batch, WORDS, dtype=jnp.bool_)).compile()


def compiled(args: argparse.Namespace) -> jax.stages.Compiled:
    """The compiled program of the command line.

    Raises UserError without libtpu, and for a program that exceeds the memory of the chip.
    """
    try:
        if args.what == "unet":
            return unet_step(args.model, args.chip, args.batch, args.size // 8)
        return local_loss(args.chip, args.batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                f"--batch {args.batch}: too big for a {args.chip}: lower it"
                f"{' or --size' if args.what == 'unet' else ''} ({reason(error)})"
            ) from None
        if "Mosaic" not in str(error) or os.environ.get("MEDSYN_KERNELS", "auto") != "auto":
            raise
        print(f"{args.chip}: XLA's own operations for kernels ({reason(error)})", file=sys.stderr)
        os.environ["MEDSYN_KERNELS"] = "xla"
        return compiled(args)
    except RuntimeError as error:
        if "TPU" not in str(error):
            raise
        raise UserError("no TPU compiler here: pip install -e '.[tpu]'") from None


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", choices=("unet", "local"), default="unet")
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--batch", type=_positive, default=8)
    parser.add_argument("--size", type=_positive, default=512, help="side of the images in pixels")
    args = parser.parse_args()
    if args.size % 64:
        parser.error(f"argument --size: {args.size}: give a multiple of 64")
    _, tflops, bandwidth, memory = CHIPS[args.chip]
    began = time.monotonic()
    try:
        program = compiled(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    cost = program.cost_analysis()
    flop, accessed = cost["flops"] / 1e12, cost["bytes accessed"] / 1e9
    sizes = program.memory_analysis()
    temporaries, weights = sizes.temp_size_in_bytes / 1e9, sizes.argument_size_in_bytes / 1e9
    arguments = (
        vars(args) if args.what == "unet" else {k: vars(args)[k] for k in ("what", "chip", "batch")}
    )
    row = arguments | {
        "tflop": flop,
        "gb_accessed": accessed,
        "gb_temporaries": temporaries,
        "gb_arguments": weights,
        "fits": temporaries + weights < memory,
        "ms_of_arithmetic": 1e3 * flop / tflops,
        "ms_of_traffic": 1e3 * accessed / bandwidth,
        "compile_s": time.monotonic() - began,
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
