"""Time segmentation on stored feature maps against the same with the encoder in every step.

    python -m scripts.bench_segment [--images 2000] [--epochs 3] [--tuned]

Both train the demo's decoders (1, 10 and 100 % of the labels x 3 seeds, the same epochs, early
stopping off) on random images at the demo's size and print the seconds and their ratio; to make the
maps counts. With the encoder in every step, images are also augmented, since only then they can be;
--tuned trains the encoder, too. Compilation is left out: a fit of one epoch comes first.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from configs import convirt
from configs import segment as configs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.data.store import splits
from medsyn_jax.tasks import segment
from medsyn_jax.train import frozen


def fields(count: int, size: int) -> dict[str, segment.Masked]:
    """Random images in shares of 0.8, 0.1 and 0.1, a quarter of them with a mask."""
    rng = np.random.default_rng(0)
    data = {}
    for split, share in zip(splits.SPLITS, (0.8, 0.1, 0.1), strict=True):
        n = round(share * count)
        images = rng.integers(0, 256, (n, size, size), np.uint8)
        masks = np.zeros_like(images)
        masks[::4, size // 2 :, : size // 3] = 255
        keys = [f"{split}/{i}" for i in range(n)]
        data[split] = segment.Masked(images, masks, keys, np.array(keys))
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--decoder", default="unet")
    args = parser.parse_args()
    config = configs.get_config()
    config.decoder.kind = args.decoder
    config.fit.update({"epochs": args.epochs, "patience": args.epochs, "steps": 10**9})
    data, mesh, seconds = fields(args.images, config.data.size), meshes.make_mesh(), {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "config.json").write_text(
            json.dumps({"config": json.loads(convirt.get_config().to_json())})
        )
        encoder = frozen.untrained(run, 0)
        fractions = segment.make_fractions(config, run, data["train"])
    first = {"1%": fractions["1%"]}
    for name, memory_mib in (("stored maps", 8192), ("encoder in every step", 0)):
        config.data.memory_mib = memory_mib
        config.encoder.frozen = memory_mib > 0 or not args.tuned
        programs = segment.make_programs(config, encoder)
        warm, config.fit.epochs = config.fit.epochs, 1
        segment.segment_by(config, programs, name, [encoder], data, first, mesh)
        config.fit.epochs = warm
        start = time.perf_counter()
        segment.segment_by(config, programs, name, [encoder], data, fractions, mesh)
        seconds[name] = time.perf_counter() - start
    stored, running = seconds.values()
    print(
        f"{len(fractions)} fractions x {config.seeds} seeds x {args.epochs} epochs on "
        f"{args.images} images of {config.data.size} pixels, {jax.devices()[0].device_kind}: "
        + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        + f", ratio {running / stored:.2f}"
    )


if __name__ == "__main__":
    main()
