"""What fewer FLOPs an image cost in fidelity and labels: the curve that defaults are taken from.

    python -m scripts.sampling_curve --pipeline runs/finetune_diffusion-demo/pipeline \
        --encoder runs/convirt-demo --images 256

For each setting of the sampler it draws the images of the same held-out phantom reports from the
same noise, and prints one row: FLOPs an image as compiled, their share of the reference's (PNDM, 75
steps, all guided, as RoentGen samples); the Frechet distance to the real images of these reports on
features of the encoder; the mean AUROC of a probe that learned the findings from real training
images; and the root mean square difference to the reference's images in grey levels. The last row
is the real images, compared with real training images.
"""

import argparse
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import curate as curate_configs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.curation import estimates, fidelity
from medsyn_jax.data import prompts, shards
from medsyn_jax.diffusion import generator as generators
from medsyn_jax.diffusion import sampler, schedule
from medsyn_jax.diffusion.generator import Generator, Sampling
from medsyn_jax.models import pipeline as pipelines
from medsyn_jax.train import corpus, encoders, features, probe

REFERENCE = Sampling("pndm", 75, 3.0)
BATCH = 32


def settings(guidance: float) -> list[Sampling]:
    """The reference, then fewer steps, then guidance in an interval, then a feature cache."""
    plain = [Sampling(n, s, guidance) for n in ("dpm++2m", "unipc") for s in (20, 10)]
    middle = [Sampling("dpm++2m", s, guidance, (0.3, 5.0)) for s in (20, 10)]
    cached = [Sampling("dpm++2m", 20, guidance, i, 0.0, 2) for i in ((), (0.3, 5.0))]
    others = [Sampling("dpm++2m", 20, g) for g in (1.0, 2.0, 5.0)]
    return [
        Sampling("pndm", 75, guidance),
        *plain,
        Sampling("dpm++2m", 15, guidance),
        *middle,
        *cached,
        *others,
    ]


class Costs:
    """FLOPs of the networks as compiled for one image, by which part of a step it is."""

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
        """FLOPs of one image; the sampler's own arithmetic, some thousand a step, is left out."""
        table = schedule.make_table(chosen.name, config, chosen.steps)
        guided, full = sampler.plan(
            table.steps.sigma,
            guidance=chosen.guidance,
            interval=chosen.interval or (0.0, math.inf),
            cache_every=chosen.cache_every,
        )
        calls = 1 + np.asarray(guided)
        each = np.where(np.asarray(full), self.full, self.shallow)
        return float((calls * each).sum()) + self.decode + self.text


def _flops(f, *args) -> float:
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipeline", default="assets/phantom-diffusion")
    parser.add_argument("--encoder", default="runs/convirt-demo", help="a pre-training workdir")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=REFERENCE.guidance)
    parser.add_argument("--out", default="", help="JSON file for the rows")
    args = parser.parse_args()
    config = curate_configs.get_config()
    workdir = Path(args.encoder).parent
    folder = corpus.prepare("phantom", config.ingest, workdir / "data")
    pipeline = pipelines.read(args.pipeline)
    held = prompts.from_shards(folder, ("test",), ("impression",), args.images).items
    texts = [p.text for p in held]
    rows = {key: i for i, key in enumerate(shards.open_split(folder, "test").keys)}
    rows = np.array([rows[p.key] for p in held])
    encoder, mesh = encoders.pretrained(Path(args.encoder)), meshes.make_mesh()
    cache = workdir / "curve-features"
    train, valid, test = (
        features.table(encoder, shards.open_split(folder, s), mesh, cache, batch_size=64, threads=2)
        for s in ("train", "valid", "test")
    )
    real, labels, subjects = test.features[rows], test.labels[rows], test.subjects[rows]
    names = shards.open_split(folder, "test").label_names
    known = np.array([{0, 1} <= set(labels[:, i].tolist()) for i in range(len(names))])
    fitted = probe.fit(
        jnp.asarray(train.features),
        jnp.asarray(np.where(train.labels < 0, -2, train.labels)[:, known]),
        jnp.arange(len(train.labels), dtype=jnp.int32)[None],
        jnp.asarray(valid.features),
        jnp.asarray(np.where(valid.labels < 0, -2, valid.labels)[:, known]),
        jax.random.split(jax.random.key(0), 1),
        classes=int(known.sum()),
        settings=probe.ProbeSettings(kind="multilabel", **config.probe),
    )
    shown = [n for n, k in zip(names, known, strict=True) if k]

    def judge(x: np.ndarray) -> dict:
        logits = np.asarray(probe.logits(fitted, jnp.asarray(x)))
        y = np.where(labels < 0, -2, labels)[:, known]
        found = estimates.aurocs(logits, y, shown, subjects)["mean"]
        return {"auroc": found["value"], "auroc_ci95": found.get("ci95")}

    forward = jax.jit(encoder.pooled)
    costs = Costs(pipeline, generators.native_size(pipeline))
    reference, made = None, []
    for chosen in settings(args.guidance):
        maker = Generator(pipeline, chosen, seed=0, batch=BATCH)
        images = maker.images(np.arange(len(texts)), texts)
        parts = [
            np.asarray(forward(encoder.params, encoder.stats, jnp.asarray(images[i : i + 64])))
            for i in range(0, len(images), 64)
        ]
        x, flops = np.concatenate(parts), costs.of(chosen, dict(pipeline.scheduler))
        reference = images if reference is None else reference
        gap = images.astype(np.float32) - reference
        row = {"sampler": vars(chosen), "gflop": flops / 1e9}
        row |= {"share": row["gflop"] / (made[0]["gflop"] if made else row["gflop"])}
        row |= {"frechet": fidelity.frechet_distance(x, real), **judge(x)}
        row |= {"rms_to_reference": float(np.sqrt(np.square(gap).mean()))}
        made.append(row)
        print(json.dumps(row), flush=True)
    some = np.random.default_rng(0).permutation(len(train.features))[: len(real)]
    row = {"sampler": "real", "frechet": fidelity.frechet_distance(train.features[some], real)}
    made.append(row | judge(real))
    print(json.dumps(made[-1]), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
