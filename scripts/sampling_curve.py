"""Measure what fewer FLOPs per image cost in fidelity and labels, for the sampler's defaults.

    python -m scripts.sampling_curve --pipeline runs/finetune_diffusion-demo/pipeline \
        --encoder runs/convirt-demo --images 256

For each setting of the sampler the script draws images of the same held-out phantom reports from
the same noise, and prints one JSON row with

- FLOPs of an image as compiled, and their share of the reference's (PNDM, 75 steps, all guided, as
  RoentGen samples);
- the Frechet distance to the real images of these reports on features of the encoder;
- the mean AUROC of a probe that learned the findings from real training images;
- the differences of both to the reference, with 95 % bootstrap intervals over subjects, resampled
  alike for both;
- the root mean square difference to the reference's images in grey levels.

The last row is the real images, compared with real training images. A table in Markdown follows.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import curate as curate_configs
from medsyn_jax.core import estimates, metrics
from medsyn_jax.core import mesh as meshes
from medsyn_jax.curation import fidelity
from medsyn_jax.data.sources import prompts
from medsyn_jax.data.store import shards
from medsyn_jax.diffusion import generator as generators
from medsyn_jax.diffusion import sampler, schedule
from medsyn_jax.diffusion.generator import Generator, Sampling
from medsyn_jax.models.diffusion import pipeline as pipelines
from medsyn_jax.train import corpus, features, frozen, probe

BATCH = 32
DRAWS = 200  # resamples of a Frechet distance; each takes a matrix decomposition


def settings(guidance: float) -> list[Sampling]:
    """The reference, then fewer steps, guidance intervals, a feature cache, other guidance."""

    def dpm(interval: tuple[float, ...] = (), cache: int = 1, weight: float = guidance) -> Sampling:
        return Sampling("dpm++2m", 20, weight, interval, 0.0, cache)

    middle = (0.3, 5.0)
    limits = [middle, (0.2, 8.0), (0.6, 3.0), (0.0, 5.0), (0.3, math.inf)]
    return [
        Sampling("pndm", 75, guidance),
        dpm(),
        *(Sampling(name, 10, guidance) for name in ("dpm++2m", "unipc")),
        *(dpm(interval) for interval in limits),
        dpm(cache=2),
        *(dpm(middle, cache) for cache in (2, 3)),
        dpm((0.6, 3.0), 2),
        *(dpm(middle, 2, weight) for weight in (1.0, 2.0, 3.0, 5.0) if weight != guidance),
    ]


class Costs:
    """FLOPs of the compiled networks for one image, by part of a step."""

    def __init__(self, pipeline: pipelines.Pipeline, size: int):
        parts = pipeline.parts
        side = size // generators.factor(pipeline)
        channels = parts["unet"].params["enter"]["kernel"].shape[2]
        length = generators.text_length(pipeline)
        width = parts["text_encoder"].params["word"]["table"].shape[1]
        x = jnp.zeros((2, side, side, channels))
        context, t = jnp.zeros((2, length, width)), jnp.zeros((2,))
        unet, vae, text = (pipelines.module_of(parts[n]) for n in ("unet", "vae", "text_encoder"))
        p = {name: part.params for name, part in parts.items()}
        self.full = _flops(lambda p, *a: unet(p)(*a), p["unet"], x, t, context) / 2
        deep = jax.eval_shape(lambda p, *a: unet(p).full(*a)[1], p["unet"], x, t, context)
        shallow = (lambda p, *a: unet(p).shallow(*a), p["unet"], x, t, context, deep)
        self.shallow = _flops(*shallow) / 2
        self.decode = _flops(lambda p, x: vae(p).decode(x), p["vae"], x) / 2
        ids = jnp.zeros((2, length), jnp.int32)
        self.text = _flops(lambda p, i: text(p)(i), p["text_encoder"], ids) / 2

    def of(self, chosen: Sampling, config: dict) -> float:
        """FLOPs of one image, without the sampler's own arithmetic, some thousand FLOPs a step."""
        table = schedule.make_table(chosen.name, config, chosen.steps)
        low, high = chosen.interval or (0.0, math.inf)
        guided, full = sampler.plan(
            table.steps.sigma,
            guidance=chosen.guidance,
            interval=(low, high),
            cache_every=chosen.cache_every,
        )
        calls = 1 + np.asarray(guided)
        each = np.where(np.asarray(full), self.full, self.shallow)
        return float((calls * each).sum()) + self.decode + self.text


def _flops(f: Callable, *args: Any) -> float:
    cost = jax.jit(f).lower(*args).compile().cost_analysis()
    assert cost is not None  # the CPU and GPU compilers report the cost
    return cost["flops"]


@dataclass(frozen=True)
class Judged:
    """AUROC and Frechet distance of images of the reports."""

    auroc: estimates.Figure
    frechet: float
    frechet_draws: np.ndarray | None = None  # [DRAWS]; None for images of other reports

    def entries(self, reference: "Judged | None") -> dict[str, Any]:
        """Entries of a JSON row, with the differences to the reference if there is one."""
        row: dict[str, Any] = {"frechet": self.frechet} | _entries("auroc", self.auroc.estimate())
        if reference is None:
            return row
        row |= _entries("auroc_difference", (self.auroc - reference.auroc).estimate())
        if self.frechet_draws is not None and reference.frechet_draws is not None:
            # Repeated images impoverish the covariances of a resample, so every distance is too
            # large there, the larger ones the more so. Only the spread of the draws is used; their
            # mean, which has that bias, is moved to the value.
            value = self.frechet - reference.frechet
            draws = self.frechet_draws - reference.frechet_draws
            entry = estimates.estimate(value, len(draws), draws - draws.mean() + value)
            row |= _entries("frechet_difference", entry)
        return row


def _entries(name: str, entry: estimates.Estimate) -> dict[str, Any]:
    return {name: entry["value"], f"{name}_ci95": entry.get("ci95")}


@dataclass(frozen=True)
class Held:
    """Held-out reports with their real images, and a probe of the findings."""

    texts: list[str]
    real: np.ndarray  # features, float32 [n, f]
    train: np.ndarray  # features of as many real training images
    labels: np.ndarray  # [n, c]
    names: list[str]  # of the c labels that have both classes
    subjects: np.ndarray  # [n]
    fitted: probe.Probe

    def judge(self, x: np.ndarray) -> Judged:
        """x: features [n, f] of images of the reports."""
        draws = [
            fidelity.frechet_distance(x[rows], self.real[rows])
            for weights in estimates.resample_weights(self.subjects, DRAWS)
            for rows in (np.repeat(np.arange(len(x)), w) for w in weights.astype(int))
        ]
        frechet = fidelity.frechet_distance(x, self.real)
        return Judged(self.auroc(x), frechet, np.array(draws))

    def judge_real(self) -> Judged:
        """Judge the real images; their distance is that to real training images."""
        return Judged(self.auroc(self.real), fidelity.frechet_distance(self.train, self.real))

    def auroc(self, x: np.ndarray) -> estimates.Figure:
        logits = np.asarray(probe.logits(self.fitted, jnp.asarray(x)))
        figures = metrics.aurocs(logits, self.labels, self.names, self.subjects)
        return figures["mean"]


def hold(encoder: frozen.Encoder, root: Path, images: int) -> Held:
    """The first `images` test reports of the phantom corpus, which is kept below `root`."""
    config = curate_configs.get_config()
    folder = corpus.prepare("phantom", config.ingest, root / "data")
    chosen = prompts.from_shards(folder, ("test",), ("impression",), images).items
    sets = [shards.open_split(folder, split) for split in ("train", "valid", "test")]
    place = {key: row for row, key in enumerate(sets[2].keys)}
    rows = np.array([place[prompt.key] for prompt in chosen])
    mesh, sizes = meshes.make_mesh(), {"batch_size": 64, "threads": 2}
    train, valid, test = (
        features.table(encoder, records, mesh, root / "curve-features", **sizes) for records in sets
    )
    labels = test.labels[rows]
    both = (labels == 1).any(axis=0) & (labels == 0).any(axis=0)
    fitted = probe.fit(
        jnp.asarray(train.features),
        jnp.asarray(_targets(train.labels[:, both])),
        jnp.arange(len(train.labels), dtype=jnp.int32)[None],
        jnp.asarray(valid.features),
        jnp.asarray(_targets(valid.labels[:, both])),
        jax.random.split(jax.random.key(0), 1),
        classes=int(both.sum()),
        settings=probe.ProbeSettings(kind="multilabel", **config.probe),
    )
    some = np.random.default_rng(0).permutation(len(train.features))[: len(rows)]
    return Held(
        [prompt.text for prompt in chosen],
        test.features[rows],
        train.features[some],
        _targets(labels[:, both]),
        [name for name, k in zip(sets[2].label_names, both, strict=True) if k],
        test.subjects[rows],
        fitted,
    )


def _targets(labels: np.ndarray) -> np.ndarray:
    """Labels as 1, 0, or -2 = left out; "uncertain" is left out."""
    return np.where(labels < 0, -2, labels)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    paired = "difference (paired)"
    head = ["sampler", "GFLOP", "share", "Fréchet", paired, "AUROC", paired, "rms"]
    lines = [head]
    for row in rows:
        cells = [_named(row["sampler"])]
        for name, form in (("gflop", ".1f"), ("share", ".3f"), ("frechet", ".2f")):
            cells.append(_number(row, name, form))
        cells.append(_number(row, "frechet_difference", "+.2f"))
        cells.append(_number(row, "auroc", ".3f"))
        cells.append(_number(row, "auroc_difference", "+.3f"))
        lines.append([*cells, _number(row, "rms_to_reference", ".1f")])
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|---" * len(head) + "|", *others])


def _number(row: dict[str, Any], name: str, form: str) -> str:
    """The number with its interval, if any; "" if the row lacks the number."""
    if row.get(name) is None:
        return ""
    interval = row.get(f"{name}_ci95")
    ends = f" [{', '.join(format(end, form) for end in interval)}]" if interval else ""
    return format(row[name], form) + ends


def _named(chosen: dict[str, Any] | str) -> str:
    if isinstance(chosen, str):
        return "real images (Fréchet: to as many real training images)"
    text = f"{chosen['name']} {chosen['steps']}, guidance {chosen['guidance']:g}"
    if chosen["interval"] and chosen["guidance"] != 1:
        low, high = chosen["interval"]
        text += " where " + (f"{low:g} < " if low else "") + "sigma"
        text += f" <= {high:g}" if high is not None else ""
    return text + (f", cache {chosen['cache_every']}" if chosen["cache_every"] > 1 else "")


def _sampler(chosen: Sampling) -> dict[str, Any]:
    """The sampler for JSON, which has no infinity."""
    return vars(chosen) | {"interval": [x if x < math.inf else None for x in chosen.interval]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pipeline", default="assets/phantom-diffusion")
    parser.add_argument("--encoder", default="runs/convirt-demo", help="a pre-training workdir")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--rows", type=int, nargs="*", help="compute only these and row 0")
    parser.add_argument("--out", default="", help="JSON file to write the rows to")
    args = parser.parse_args()
    pipeline, encoder = pipelines.read(args.pipeline), frozen.pretrained(Path(args.encoder))
    held = hold(encoder, Path(args.encoder).parent, args.images)
    forward = jax.jit(frozen.Encoder.pooled)
    costs = Costs(pipeline, generators.native_size(pipeline))
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    first: Judged | None = None
    drawn = np.empty(0, np.uint8)  # images of the reference
    every = settings(args.guidance)
    some = every if args.rows is None else [every[row] for row in (0, *args.rows)]
    for chosen in some:
        maker = Generator(pipeline, chosen, seed=0, batch=min(BATCH, len(held.texts)))
        images = maker.images(np.arange(len(held.texts)), held.texts)
        parts = [jnp.asarray(images[i : i + 64]) for i in range(0, len(images), 64)]
        x = [np.asarray(forward(encoder, part)) for part in parts]
        judged = held.judge(np.concatenate(x))
        gflop = costs.of(chosen, dict(pipeline.scheduler)) / 1e9
        drawn = images if first is None else drawn
        gap = images.astype(np.float32) - drawn
        row = {"sampler": _sampler(chosen), "gflop": gflop}
        row["share"] = gflop / (rows[0]["gflop"] if rows else gflop)
        rms = float(np.sqrt(np.square(gap).mean()))
        add(row | judged.entries(first) | {"rms_to_reference": rms})
        first = first or judged
    add({"sampler": "real"} | held.judge_real().entries(first))
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{len(held.texts)} images\n\n{table(rows)}")


if __name__ == "__main__":
    main()
