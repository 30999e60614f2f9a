"""A pre-training run and a set of pairs, both tiny, as later tasks find them on disk."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.train.checkpoint import Checkpoints
from tests.train import toy

SIZE, CROP = 20, 16
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the image is bright dark left no side . a b c d e f"


def write_run(workdir: Path) -> dict:
    """What later tasks need of a pre-training run: its config and a checkpoint of this state."""
    rng = np.random.default_rng(0)
    noisy = {k: v for k, v in toy.initial().items() if k != "step"}
    noisy = jax.tree.map(lambda x: (x + rng.random(x.shape) / 10).astype(x.dtype), noisy)
    state = jax.device_put(noisy | {"step": np.int32(7)}, jax.devices()[0])
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(state, {})
    checkpoints.wait()
    checkpoints.close()
    config = {
        "dtype": "float32",
        "image": {**toy.IMAGE, "mean": 0.4, "std": 0.2},
        "data": {"size": SIZE},
        "augment": {"size": CROP},
    }
    (workdir / "config.json").write_text(json.dumps({"config": config}))
    return state


def write_pair_run(workdir: Path) -> None:
    """`write_run` with what its text tower needs."""
    write_run(workdir)
    config = json.loads((workdir / "config.json").read_text())["config"]
    config |= {"text": toy.TEXT, "heads": toy.HEADS}
    config["data"] |= {"tokenizer": "", "tokens": 8, "sections": ["impression"]}
    (workdir / "config.json").write_text(json.dumps({"config": config}))
    (workdir / "tokenizer").mkdir()
    (workdir / "tokenizer" / "vocab.txt").write_text(WORDS.replace(" ", "\n") + "\n")


def write_pairs(
    folder: Path,
    count: int = 60,
    report: Callable[[bool, bool], str] = lambda bright, left: "The lungs are clear.",
) -> Path:
    """A CSV of images of SIZE; `bright` and `left` can be seen in them, `rare` is always 0.

    report: of the labels in the table (bright is not 0, left is 1).
    """
    rng = np.random.default_rng(0)
    folder.mkdir()
    table = [("image", "report", "subject", "split", "bright", "left", "rare")]
    for i in range(count):
        split = ("train", "train", "train", "valid", "test")[i // 2 % 5]
        bright, left = (int(b) for b in rng.integers(0, 2, 2))
        pixels = rng.integers(0, 90, (SIZE, SIZE)) + 90 * bright
        pixels[:, : SIZE // 2] += 60 * left
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
        bright, left = -1 if i % 10 == 8 else bright, "" if i % 9 == 0 else left
        row = (f"{i:03d}.png", report(bright != 0, left == 1), f"p{i // 2}", split)
        table.append((*row, bright, left, 0))
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    return folder / "pairs.csv"


def write_swapped(folder: Path, split: str) -> tuple[Path, Path]:
    """`write_pairs`, and the same table with this split and train exchanged."""
    path = write_pairs(folder)
    text = path.read_text().replace(",train,", ",old,")
    other = folder / f"{split}.csv"
    other.write_text(text.replace(f",{split},", ",train,").replace(",old,", f",{split},"))
    return path, other


def ingest_config():
    config = get_config("pairs").ingest
    config.update({"size": SIZE, "workers": 1})
    config.pairs.update({"subject": "subject", "split": "split"})
    config.pairs.labels = ("bright", "left", "rare")
    return config
