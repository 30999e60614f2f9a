"""Generation: prompts become shards of synthetic radiographs, <workdir>/shards.

What is made, and in which shard it lies, is a function of the config, the prompts and the weights
alone. Shard i is written by process i modulo their number, on the devices of that process: there is
no communication until all are done.
"""

import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from medsyn_jax.core import checks, log, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.curation import quality
from medsyn_jax.data.images import decode
from medsyn_jax.data.loading import loader
from medsyn_jax.data.sources import prompts
from medsyn_jax.data.sources.prompts import Prompt, Prompts
from medsyn_jax.data.store import build, card, shards, splits, writer
from medsyn_jax.data.store.build import Part, Plan
from medsyn_jax.data.text import reports, tokenizers
from medsyn_jax.diffusion import generator as generators
from medsyn_jax.diffusion.generator import Chunk, Generator, NotFinite, Sampling
from medsyn_jax.diffusion.schedule import SAMPLERS
from medsyn_jax.models.diffusion import pipeline as pipelines
from medsyn_jax.models.diffusion.pipeline import Pipeline
from medsyn_jax.train import corpus, frozen

FREE = ("pipeline", "ingest.workers")
DEFAULT = "assets/phantom-diffusion"
_ROOT = Path(__file__).resolve().parents[2]
_ENCODERS = 4  # threads that pack images while the devices work


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image to be made; `index` is that of its noise."""

    key: str
    index: int
    prompt: Prompt

    @property
    def subject(self) -> str:
        """That of the report."""
        return self.prompt.subject


@dataclasses.dataclass(frozen=True)
class Filter:
    """Makes images anew that fit their reports worse than real ones do; see `quality.retry`."""

    pair: frozen.Pair  # whose alignment scores are asked
    threshold: float
    attempts: int

    def choose(
        self, part: Part, pixels: Sequence[np.ndarray], generator: Generator
    ) -> tuple[list[np.ndarray], list[int]]:
        """The images to keep, and which attempt each is. pixels: the first attempts."""
        asked = [picture.prompt for picture in part.items]
        texts = [
            reports.select_text(p.findings, p.impression, p.report, self.pair.sections) or p.text
            for p in asked
        ]

        def again(rows: list[int], attempt: int) -> Sequence[np.ndarray]:
            indices = [part.items[row].index for row in rows]
            return list(generator.images(indices, [asked[row].text for row in rows], attempt))

        def score(made: Sequence[np.ndarray], rows: list[int]) -> np.ndarray:
            return frozen.scores(self.pair, made, [texts[row] for row in rows])

        return quality.retry(pixels, again, score, self.threshold, self.attempts)


def run(config: Any, workdir: Path) -> None:
    """Makes the images; running it again completes what was begun.

    Raises:
        UserError: for a pipeline, prompts or settings that cannot be used, a full disk, a sampler
            that diverges, or a workdir that holds something else. What was complete is kept.
    """
    pipeline = pipelines.read(_folder(config.pipeline), report=log.say)
    generators.check(pipeline, _sampling(config), config.size)
    found = _prompts(config, workdir, pipeline)
    judge = _filter(config, workdir)
    plan = make_plan(config, found, pipeline, judge.threshold if judge else None)
    outputs.write_config(workdir, config)
    total = sum(len(part.items) for part in plan.parts)
    marks = f", marks of de-identification taken out of {found.marked}" if found.marked else ""
    rejected = f"{len(found.rejects)} rejected"
    log.say(f"generate: {total} images of {len(found.items)} prompts, {rejected}{marks}")
    to, first = workdir / "shards", jax.process_index() == 0

    def make(parts: Sequence[Part]) -> None:
        if first:
            card.remove(to)
        if any(part.finished(to) is None for part in parts):
            _write_parts(plan, parts, _generator(config, pipeline), judge, to)

    build.write(to, plan, make, jax.process_index(), jax.process_count(), meshes.wait_for_all)
    if first:
        if not card.is_written(to):
            card.write(to)
        _write_results(workdir, to)
    log.say_cost("done")


def _check_interval(config: Any) -> None:
    interval = config.sampler.interval
    if interval and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
        raise UserError(
            f"config.sampler.interval: {interval}: give two noise levels, the lower first, or ()"
        )


CHECKS = (
    checks.numbers("above 0", "", "images_per_prompt batch_per_device records_per_shard"),
    checks.numbers("above 0", "sampler", "steps cache_every"),
    checks.numbers("above 0", "filter", "attempts"),
    checks.numbers("from 0", "", "size"),
    checks.numbers("from 0", "data", "limit"),
    checks.numbers("from 0", "sampler", "guidance"),
    checks.numbers("share", "sampler", "rescale"),
    checks.numbers("share", "filter", "quantile"),
    checks.choice("dtype", checks.DTYPES),
    checks.choice("sampler.name", SAMPLERS),
    checks.choices("data.splits", splits.SPLITS),
    _check_interval,
)


def _folder(named: str) -> Path:
    """The folder of the pipeline, here or in the repository."""
    tried = (Path(named), _ROOT / named)
    for path in tried:
        if path.is_dir():
            return path
    how = "name a Stable Diffusion folder by --config.pipeline=DIR (docs/generation.md: where from)"
    if named == DEFAULT:
        how = f"make it by `--config configs/finetune_diffusion.py`, or {how}"
    raise UserError(
        f"config.pipeline: {named}: no such folder (looked at "
        f"{' and '.join(str(path.absolute()) for path in tried)}): {how}"
    )


def _prompts(config: Any, workdir: Path, pipeline: Pipeline) -> Prompts:
    data = config.data
    path = Path(data.source)
    if path.name.lower().endswith((".csv", ".csv.gz", ".tsv")):
        shares = config.ingest.split_shares
        where = (data.columns, data.splits, shares, config.seed)
        found = prompts.from_csv(path, *where, data.limit)
    elif prompts.is_mimic(path):
        found = prompts.from_mimic(path, data.reports, data.splits, data.sections, data.limit)
    else:
        folder = corpus.prepare(data.source, config.ingest, workdir.parent / "data")
        found = prompts.from_shards(folder, data.splits, data.sections, data.limit)
    tokenizer = tokenizers.load(pipeline.tokenizer)
    return prompts.fit(found, tokenizer, generators.text_length(pipeline))


def _filter(config: Any, workdir: Path) -> Filter | None:
    """The filter with the threshold of the real validation pairs; None where none is asked for."""
    settings = config.filter
    if not settings.encoder:
        return None
    pair = frozen.pretrained_pair(Path(settings.encoder))
    folder = corpus.prepare(settings.real, config.ingest, workdir.parent / "data", "real")
    inputs = (pair.sections, pair.tokenizer, pair.tokens, pair.size)
    valid = loader.Source(folder, "valid", *inputs)
    pixels = valid.take(np.arange(len(valid)))["image"]
    scores = frozen.scores(pair, list(pixels), valid.texts())
    threshold = quality.alignment_threshold(scores, settings.quantile)
    log.say(f"filter: images that score below {threshold:.3f} are made anew")
    return Filter(pair, threshold, settings.attempts)


def make_plan(
    config: Any, found: Prompts, pipeline: Pipeline, threshold: float | None = None
) -> Plan:
    """Which image goes to which shard, in the order of the prompts; nothing is computed."""
    count, size = config.images_per_prompt, config.records_per_shard
    pictures = [
        Picture(f"{p.key}#{k}" if count > 1 else p.key, i * count + k, p)
        for i, p in enumerate(found.items)
        for k in range(count)
    ]
    members = {s: [p for p in pictures if p.prompt.split == s] for s in splits.SPLITS}
    parts = build.divide("synthetic", members, size)
    weights = generators.fingerprint(pipeline)
    sampling = config.sampler.to_dict()
    content = ("seed", "dtype", "images_per_prompt", "batch_per_device", "records_per_shard")
    settings = {name: config[name] for name in content} | {
        "size": config.size or generators.native_size(pipeline),
        "sampler": sampling,
        "prompts": config.data.to_dict(),
        "pipeline": weights,
    }
    if threshold is not None:
        settings["filter"] = {"threshold": threshold, "attempts": config.filter.attempts}
    settings = json.loads(json.dumps(settings))
    digest = hashlib.sha256(json.dumps([shards.FORMAT, settings], sort_keys=True).encode())
    for item in found.items:
        digest.update(json.dumps(dataclasses.astuple(item)).encode())
    name = _folder(config.pipeline).resolve().name
    short = f"{sampling['name']} {sampling['steps']} steps, guidance {sampling['guidance']:g}"
    return Plan(
        parts=parts,
        label_names=found.label_names,
        source="generated",
        settings=settings,
        fingerprint=digest.hexdigest(),
        others="the prompts",
        rejects=found.rejects,
        info={
            "generator": f"{name} {weights[:8]}, {short}",
            "license": config.license,
            "prompts": {
                "source": config.data.source,
                "count": len(found.items),
                "rejected": len(found.rejects),
                "truncated": found.truncated,
                "control_characters": found.control_characters,
            },
        },
    )


def _sampling(config: Any) -> Sampling:
    return Sampling(**config.sampler.to_dict())


def _generator(config: Any, pipeline: Pipeline) -> Generator:
    return Generator(
        pipeline,
        _sampling(config),
        seed=config.seed,
        batch=config.batch_per_device,
        size=config.size,
        dtype=jnp.dtype(config.dtype),
    )


def _write_parts(
    plan: Plan, own: Sequence[Part], generator: Generator, judge: Filter | None, to: Path
) -> None:
    """Writes those of the parts that are not there yet; `own` are this process's."""
    todo = [part for part in own if part.finished(to) is None]
    total, left = (sum(len(part.items) for part in parts) for parts in (own, todo))
    done = total - left
    stream = generator.stream(chunk for part in todo for chunk in _chunks(part, generator))
    writing: deque[futures.Future] = deque()
    # The pool's end waits for the shards that are being written, whatever has ended this.
    bar, pool = log.ImagesBar("generate", total, done), futures.ThreadPoolExecutor(1)
    try:
        with bar as progress, pool:
            for part in todo:
                pixels: list[np.ndarray] = []
                while len(pixels) < len(part.items):
                    pixels += list(next(stream))
                    progress.show(done + len(pixels))
                    if writing and writing[0].done():
                        writing.popleft().result()
                done += len(pixels)
                attempts = [0] * len(pixels)
                if judge:
                    pixels, attempts = judge.choose(part, pixels, generator)
                while len(writing) > 1:
                    writing.popleft().result()
                writing.append(pool.submit(_write_part, plan, part, pixels, attempts, to))
            for future in writing:
                future.result()
    except NotFinite as error:
        _refuse(error, todo, generator.sampling)


def _chunks(part: Part, generator: Generator) -> Iterator[Chunk]:
    """The records of a part as the devices take them; its distinct prompts are encoded once."""
    texts = [picture.prompt.text for picture in part.items]
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    contexts = generator.encode(list(distinct))
    rows = np.array([distinct[text] for text in texts])
    indices = np.array([picture.index for picture in part.items])
    for i in range(0, len(rows), generator.batch):
        yield Chunk(indices[i : i + generator.batch], contexts[rows[i : i + generator.batch]])


def _refuse(error: NotFinite, parts: Sequence[Part], sampling: Sampling) -> NoReturn:
    pictures = (picture for part in parts for picture in part.items)
    lost = next(picture for picture in pictures if picture.index == error.index)
    raise UserError(
        f"generate: record {lost.key} ({lost.prompt.text[:60]!r}): not finite after step "
        f"{error.step} of {sampling.name}: use --config.dtype=float32, another sampler or less "
        "guidance, in another --workdir; complete shards are kept"
    ) from error


def _write_part(
    plan: Plan, part: Part, pixels: Sequence[np.ndarray], attempts: Sequence[int], to: Path
) -> None:
    seed = plan.settings["seed"]
    with futures.ThreadPoolExecutor(min(_ENCODERS, os.cpu_count() or 1)) as pool:
        packed = pool.map(decode.encode_png, pixels)
        records = (
            {
                "key": picture.key,
                "subject": picture.prompt.subject,
                "image": png,
                "report": picture.prompt.report,
                "findings": picture.prompt.findings,
                "impression": picture.prompt.impression,
                "labels": np.array(picture.prompt.labels, np.int8),
                "view": picture.prompt.view,
                "prompt": picture.prompt.text,
                "seed": f"{seed}/{picture.index}" + (f"/{attempt}" if attempt else ""),
                "generator": plan.info["generator"],
            }
            for picture, png, attempt in zip(part.items, packed, attempts, strict=True)
        )
        writer.write_shard(to / part.name, records, plan.label_names)


def _write_results(workdir: Path, to: Path) -> None:
    info = shards.describe(to)
    counts = {f"records/{s}": part["records"] for s, part in info["splits"].items()}
    results = {name: {"value": n, "n": n} for name, n in counts.items()}
    asked = info["prompts"]["count"] + info["prompts"]["rejected"]
    for name in ("rejected", "truncated", "control_characters"):
        results[f"prompts/{name}"] = {"value": info["prompts"][name], "n": asked}
    if "filter" in info["settings"]:
        sets = [shards.open_split(to, s) for s, n in info["splits"].items() if n["records"]]
        seeds = [shards.value(r.features(i), "seed") for r in sets for i in range(len(r))]
        again = sum(seed.count("/") > 1 for seed in seeds)
        results["filter/replaced"] = {"value": again / len(seeds), "n": len(seeds)}
    outputs.write_results(workdir, "generate", results)
    log.say(f"contact sheet: {to / card.SHEET}")
