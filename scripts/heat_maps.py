"""Draw where a pre-trained pair of encoders locates phrases on your own radiographs.

    python -m scripts.heat_maps --encoder runs/gloria-demo --images a.png b.dcm \\
        --phrases "left pleural effusion" nodule --out heat_maps.png

Writes one PNG and prints its name: a row for each phrase, a column for each image (PNG, JPEG, TIFF,
BMP or DICOM). Each tile shows the centre of the image that the encoder sees, red where the phrase
fits best. configs/ground.py scores such maps on phantoms, whose findings have masks.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from absl import logging

from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.core.files import replaced
from medsyn_jax.data.images import decode
from medsyn_jax.tasks import ground
from medsyn_jax.train import frozen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", type=Path, required=True, help="workdir of a pre-training run")
    parser.add_argument("--images", nargs="+", required=True, help="image files")
    parser.add_argument("--phrases", nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("heat_maps.png"))
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax warns about things that users cannot change
    try:
        pair = frozen.pretrained_pair(args.encoder)
        pixels = np.stack([pair.fit(decode.decode_grey(path)) for path in args.images])
        rows = {}
        for phrase in args.phrases:
            heat = ground.resized(frozen.heat_maps(pair, pixels, phrase), pair.crop)
            rows[phrase] = list(map(ground.overlay, pixels, heat))
        with replaced(args.out) as temporary:
            ground.sheet(rows).save(temporary, "PNG")
    except (UserError, RejectedRecord, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
