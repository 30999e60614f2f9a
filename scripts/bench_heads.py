"""Time one training step of detection (ResNet-50, YOLOv3's head) or segmentation (ResNet-50, U-Net
decoder) in torch and here, in turns.

    python -m scripts.bench_heads --task detect [--batch 8] [--repeats 5] [--tuned]

Both run the encoder in every step, frozen in evaluation mode (--tuned: trained, too), and AdamW;
fp32, all cores. Of detection ours also makes the targets from the boxes in the step; torch is
handed them. Of segmentation neither augments. torch runs as fast as it can: channels last, fused
AdamW. Prints seconds of the median step and the ratio of the speeds (above 1: we are faster).
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from configs import convirt
from configs import detect as detect_configs
from configs import segment as segment_configs
from medsyn_jax.objectives import detect
from medsyn_jax.tasks import detect as detect_task
from medsyn_jax.tasks import segment as segment_task
from medsyn_jax.train import frozen
from scripts import torch_methods  # puts tests/models on the path
from scripts.bench_step import timed

import torch_detector  # isort: skip
import torch_segmenter  # isort: skip

SIZE = 224
RESNET50 = (64, 256, 512, 1024, 2048)


def batch_of(count: int) -> dict[str, np.ndarray]:
    """Random images, each with a mask and up to three boxes."""
    rng = np.random.default_rng(0)
    low = rng.uniform(10, 120, (count, 3, 2))
    boxes = np.concatenate([low, low + rng.uniform(10, 90, low.shape)], -1).astype(np.float32)
    labels = np.where(np.arange(3)[None] < rng.integers(0, 4, (count, 1)), 0, -1).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (count, SIZE, SIZE), np.uint8),
        "boxes": boxes,
        "labels": labels,
        "mask": rng.integers(0, 2, (count, SIZE, SIZE), np.uint8) * np.uint8(255),
    }


def our_step(task: str, batch: dict[str, np.ndarray], tuned: bool) -> Callable[[], float]:
    pretraining = convirt.get_config("paper")
    pretraining.dtype = "float32"
    config = {"detect": detect_configs, "segment": segment_configs}[task].get_config("paper")
    config.encoder.frozen = not tuned
    with tempfile.TemporaryDirectory() as folder:
        written = json.dumps({"config": json.loads(pretraining.to_json())})
        (Path(folder) / "config.json").write_text(written)
        encoder = frozen.untrained(Path(folder), 0)
    if task == "detect":
        programs = detect_task.make_programs(config, encoder, 1)
    else:
        config.augment.probability = 0.0
        programs = segment_task.make_programs(config, encoder)
    state = programs.start(jax.random.key(0), encoder.params, encoder.stats, False)

    def call() -> float:
        nonlocal state
        state, metrics = programs.step(state, batch, jax.random.key(1))
        return float(metrics["loss"])

    return call


def torch_step(task: str, batch: dict[str, np.ndarray], tuned: bool) -> Callable[[], float]:
    layout = {"memory_format": torch.channels_last}
    encoder = torch_methods.torch_resnet.ResNet().to(**layout)
    if task == "detect":
        head, loss_of = torch_detector.Detector(RESNET50[2:]), torch_detection(batch)
    else:
        head = torch_segmenter.Decoder(RESNET50, (256, 128, 64, 32, 16))
        loss_of = torch_segmentation(batch)
    head = head.to(**layout)
    encoder.train(tuned).requires_grad_(tuned)
    pixels = torch.from_numpy(batch["image"])[:, None].expand(-1, 3, -1, -1).float()
    images = ((pixels / 255 - 0.5) / 0.5).to(**layout)
    parameters = [*head.parameters(), *(encoder.parameters() if tuned else ())]
    optimizer = torch.optim.AdamW(parameters, 5e-4, weight_decay=1e-6, fused=True)

    def maps() -> list[torch.Tensor]:
        stem = torch.relu(encoder.bn1(encoder.conv1(images)))
        layer1 = encoder.layer1(encoder.maxpool(stem))
        layer2 = encoder.layer2(layer1)
        layer3 = encoder.layer3(layer2)
        return [stem, layer1, layer2, layer3, encoder.layer4(layer3)]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(tuned):
            features = maps()
        loss = loss_of(head(features[2:] if task == "detect" else features))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def torch_detection(batch: dict[str, np.ndarray]) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The loss of `objectives.detect` by the logits of each map."""
    boxes, labels = jnp.asarray(batch["boxes"]), jnp.asarray(batch["labels"])
    targets = []
    for cells, shapes in zip((7, 14, 28), detect.anchors(SIZE), strict=True):
        arrays = detect.targets(boxes, labels, shapes, cells, SIZE)[:3]
        targets.append([torch.from_numpy(np.asarray(x, np.float32).copy()) for x in arrays])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def loss_of(outputs: list[torch.Tensor]) -> torch.Tensor:
        loss = torch.zeros(())
        for output, (positive, negative, box) in zip(outputs, targets, strict=True):
            raw = output.permute(0, 2, 3, 1).unflatten(-1, (3, 6))
            there = torch.ones_like(positive)
            xy = entropy(raw[..., :2], box[..., :2], reduction="none").sum(-1)
            wh = (raw[..., 2:4] - box[..., 2:]).square().sum(-1)
            object_, class_ = (entropy(raw[..., i], there, reduction="none") for i in (4, 5))
            none = entropy(raw[..., 4], 0 * there, reduction="none")
            terms = positive * (2.5 * (xy + wh) + object_ + class_) + 0.5 * negative * none
            loss = loss + terms.mean()
        return loss

    return loss_of


def torch_segmentation(batch: dict[str, np.ndarray]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The loss of `objectives.segment` by the logits."""
    truth = torch.from_numpy(batch["mask"]).float() / 255
    entropy = torch.nn.functional.binary_cross_entropy_with_logits

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        wrong = torch.sigmoid(-logits * (2 * truth - 1))
        focal = (wrong.square() * entropy(logits, truth, reduction="none")).mean()
        p = torch.sigmoid(logits)
        overlap = (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
        return 10 * focal - overlap.log()

    return loss_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("detect", "segment"), default="detect")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tuned", action="store_true")
    args = parser.parse_args()
    batch = batch_of(args.batch)
    made = {"torch": torch_step, "medsyn_jax": our_step}
    steps = {name: make(args.task, batch, args.tuned) for name, make in made.items()}
    seconds = timed(steps, args.repeats)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    fastest = {name: min(times) for name, times in seconds.items()}
    print(
        f"{args.task}, batch {args.batch}, encoder {'tuned' if args.tuned else 'frozen'}: "
        + ", ".join(f"{name} {value:.3f} s" for name, value in medians.items())
        + f"; ratio of medians {medians['torch'] / medians['medsyn_jax']:.2f}"
        + f", of the fastest {fastest['torch'] / fastest['medsyn_jax']:.2f}"
    )


if __name__ == "__main__":
    main()
