"""Curation: whether a synthetic set can replace the real one, and what it discloses of it."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core import checks, estimates, log, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import write_text
from medsyn_jax.curation import fidelity, gallery, privacy, quality
from medsyn_jax.curation.collection import Collection, joined
from medsyn_jax.data.loading import loader
from medsyn_jax.data.sources import resolve
from medsyn_jax.data.store import shards, splits
from medsyn_jax.objectives import classify
from medsyn_jax.tables import page
from medsyn_jax.train import checkpoint, corpus, features, frozen, probe

FREE = corpus.FREE
A_PROMPT, PAIRS = 4, 500  # images of a prompt, and prompts or pairs, in a mean similarity
Results = dict[str, dict[str, Any]]


def run(config: Any, workdir: Path) -> None:
    """Judge a synthetic set; writes results.json, records.csv and report.html.

    The images of held-out prompts, if there are any, are compared with the real held-out images.
    Privacy concerns all images, and each has an alignment score. Raises UserError for an encoder or
    sets that do not fit the config or each other.
    """
    trained = Path(config.encoder.workdir)
    checkpoint.check_run(trained)  # restored when the data are known
    mesh = meshes.make_mesh(**config.mesh)
    folder = resolve.stored(Path(config.synthetic))
    info = shards.describe(folder)
    directory = corpus.prepare(config.real, config.ingest, workdir.parent / "data")
    _check_labels(info["label_names"], shards.describe(directory)["label_names"])
    encoder, pair = frozen.pretrained(trained), frozen.pretrained_pair(trained)
    judged = [s for s in splits.SPLITS if info["splits"].get(s, {}).get("records")]

    def collection(stored: Path, names: Sequence[str]) -> Collection:
        return _collection(config, encoder, pair, mesh, stored, names, workdir / "features")

    train, valid, test = (collection(directory, (split,)) for split in splits.SPLITS)
    held_out = joined(valid, test)
    synthetic = collection(folder, tuple(config.splits) or judged)
    fresh = synthetic.only_held_out()
    results = _fidelity(config, fresh, held_out)
    outputs.write_config(workdir, config)  # not before the sets are known to be large enough
    results |= _diversity(config, {"synthetic": fresh, "real": held_out})
    results |= _label_agreement(config, train, valid, {"real": test, "synthetic": fresh})
    scores, aligned = _alignment(config, pair, mesh, synthetic, held_out)
    screens, private = _privacy(config, synthetic, held_out, train)
    results |= aligned | private | _leftovers(synthetic)
    if jax.process_index() == 0:
        sheets = page.Sheets(
            gallery.prompts(fresh, (train, valid, test), config.seed),
            gallery.worst_aligned(synthetic, scores, aligned["alignment/threshold"]["value"]),
            gallery.nearest(synthetic, train, screens),
        )
        facts = {
            "synthetic": f"{config.synthetic}: {len(synthetic.keys)} images",
            "of held-out prompts": f"{len(fresh.keys)}, which all figures but privacy rest on",
            "real": f"{directory}: {len(train.keys)} training images, {len(held_out.keys)} others",
            "encoder": str(trained),
        }
        write_text(workdir / "records.csv", gallery.rows(synthetic, train, scores, screens))
        write_text(workdir / "report.html", page.document(facts, results, sheets))
    outputs.write_results(workdir, "curate", results)
    log.say(f"page: {workdir / 'report.html'}")


def _check_sets(config: Any) -> None:
    if not config.synthetic or not config.real:
        raise UserError(
            "config.synthetic and config.real: one is empty: give the folder of a generated set "
            "and the data that it is compared with, by --config.synthetic=DIR --config.real=DIR"
        )


CHECKS = (
    *probe.RULES,
    checks.numbers("above 0", "fidelity", "draws subsets subset_size"),
    checks.numbers("share", "alignment", "quantile"),
    checks.numbers("share", "privacy", "quantile"),
    checks.choices("splits", splits.SPLITS),
    _check_sets,
    checks.files(lambda config: {"synthetic": config.synthetic} | corpus.file("real", config.real)),
)


def _check_labels(synthetic: Sequence[str], real: Sequence[str]) -> None:
    if list(synthetic) != list(real):
        raise UserError(
            f"labels: the synthetic set has {', '.join(synthetic) or 'none'}; the real one has "
            f"{', '.join(real) or 'none'}: compare it with the set whose reports it was made from"
        )


def _collection(
    config: Any,
    encoder: frozen.Encoder,
    pair: frozen.Pair,
    mesh: Mesh,
    folder: Path,
    names: Sequence[str],
    cache: Path,
) -> Collection:
    inputs = (pair.sections, pair.tokenizer, pair.tokens, pair.size)
    sources = [loader.Source(folder, split, *inputs) for split in names]
    sizes = {"batch_size": config.data.batch_size, "threads": config.data.threads}
    tables = [features.table(encoder, s.records, mesh, cache, **sizes) for s in sources]
    columns = zip(*((t.features, t.labels, t.subjects) for t in tables), strict=True)
    return Collection(sources, *(np.concatenate(column) for column in columns))


def _fidelity(config: Any, synthetic: Collection, real: Collection) -> Results:
    settings = {**config.fidelity, "seed": config.seed}
    both = fidelity.compare(synthetic.features, real.features, real.subjects, **settings)
    results: Results = {}
    for name, d in zip(("frechet", "kernel"), both, strict=True):
        for side in ("synthetic", "real"):
            draws = getattr(d, side)
            results[f"fidelity/{name}/{side}"] = {
                "value": float(draws.mean()),
                "n": d.n,
                "std": float(draws.std()),
                "draws": draws.tolist(),
            }
    frechet = both[0]
    ratio = float(frechet.synthetic.mean() / max(frechet.real.mean(), 1e-12))
    return results | {"fidelity/frechet/ratio": {"value": ratio, "n": frechet.n}}


def _diversity(config: Any, sets: dict[str, Collection]) -> Results:
    results: Results = {}
    for side, images in sets.items():
        rng = np.random.default_rng(config.seed)
        for kind, chosen in _pairs(images.prompts, rng).items():
            if not len(chosen):
                continue
            similarity = np.concatenate(
                [_similarity(images, chosen[i : i + 64]) for i in range(0, len(chosen), 64)]
            )
            groups = images.prompts[chosen[:, 0]]  # pairs of one prompt are not independent
            entry = estimates.mean(similarity, groups)
            results[f"diversity/ms_ssim/{side}/{kind}"] = entry
    return results


def _pairs(prompts: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows int [p, 2] of two images of one prompt, and of two prompts, some hundreds each."""
    order = rng.permutation(len(prompts))
    by_prompt: dict[str, list[int]] = {}
    for row in order.tolist():
        by_prompt.setdefault(str(prompts[row]), []).append(row)
    several = [rows[:A_PROMPT] for rows in by_prompt.values() if len(rows) > 1][:PAIRS]
    same = [pair for rows in several for pair in combinations(rows, 2)]
    others = np.stack([order, np.roll(order, 1)], axis=1)
    others = others[prompts[others[:, 0]] != prompts[others[:, 1]]][:PAIRS]
    return {"same_prompt": np.array(same, int).reshape(-1, 2), "any": others}


def _similarity(images: Collection, rows: np.ndarray) -> np.ndarray:
    """MS-SSIM [p] of pairs of rows [p, 2]."""
    a, b = (jnp.asarray(images.pixels(rows[:, i]), jnp.float32) / 255.0 for i in (0, 1))
    return np.asarray(fidelity.ms_ssim(a, b))


def _label_agreement(
    config: Any, train: Collection, valid: Collection, judged: dict[str, Collection]
) -> Results:
    """AUROC of each finding, by a probe that learned from real training images."""
    names = np.array(train.sources[0].label_names)

    def task(columns: np.ndarray) -> probe.Task:
        uncertain = np.full(len(columns), classify.UNMENTIONED, np.int8)  # always left out
        unmentioned = np.zeros_like(uncertain) if config.unmentioned_zero else uncertain
        chosen = tuple(names[columns].tolist())
        return probe.Task("multilabel", chosen, columns, uncertain, unmentioned)

    def usable(images: Collection) -> np.ndarray:
        return probe.has_both(task(np.arange(len(names))).targets(images.labels))

    # The same labels on both sides, or their means could not be compared.
    shared = np.logical_and.reduce([usable(images) for images in (train, *judged.values())])
    if not (shared & usable(valid)).any():
        log.say("no label agreement: no label has both classes in every split and set")
        return {}
    if not shared.all():
        left_out = ", ".join(names[~shared])
        log.say(f"no label agreement of {left_out}: one class only in a split or set")
    shared_task = task(np.flatnonzero(shared))
    fitted = probe.fit_seeds(
        shared_task,
        *((images.features, shared_task.targets(images.labels)) for images in (train, valid)),
        subsets=np.tile(np.arange(len(train.labels), dtype=np.int32), (config.seeds, 1)),
        seed=config.seed,
        settings=config.probe,
    )
    results: Results = {}
    for side, images in judged.items():
        logits = np.asarray(probe.logits(fitted, jnp.asarray(images.features)))
        targets = shared_task.targets(images.labels)
        figures = probe.judge(shared_task, logits, targets, images.subjects)
        results |= {f"labels/{side}/{name}": f.estimate() for name, f in figures.items()}
    return results


def _alignment(
    config: Any, pair: frozen.Pair, mesh: Mesh, synthetic: Collection, real: Collection
) -> tuple[np.ndarray, Results]:
    """Scores [n] of all synthetic images, and figures of the held-out images of both sets."""
    results: Results = {}
    scores: dict[str, np.ndarray] = {}
    for side, images in (("real", real), ("synthetic", synthetic)):
        sizes = (config.data.batch_size, config.data.threads)
        parts = [frozen.embeddings(pair, source, mesh, *sizes) for source in images.sources]
        image, text = (np.concatenate(x) for x in zip(*parts, strict=True))
        scores[side] = quality.alignment(image, text)
        rows = images.held_out
        true, subjects = scores[side][rows], images.subjects[rows]
        wrong = quality.shuffled_alignment(image[rows], text[rows], images.texts[rows])
        results[f"alignment/{side}/true"] = estimates.mean(true, subjects)
        if np.isfinite(wrong).all():
            for name, values in (("shuffled", wrong), ("difference", true - wrong)):
                results[f"alignment/{side}/{name}"] = estimates.mean(values, subjects)
    threshold = quality.alignment_threshold(scores["real"], config.alignment.quantile)
    below = estimates.rate(~quality.keep(scores["synthetic"][synthetic.held_out], threshold))
    below["chance"] = float(np.mean(~quality.keep(scores["real"], threshold)))
    results["alignment/threshold"] = {"value": threshold, "n": len(scores["real"])}
    results["alignment/synthetic/below"] = below
    return scores["synthetic"], results


def _privacy(
    config: Any, synthetic: Collection, held_out: Collection, train: Collection
) -> tuple[dict[str, privacy.Screen], Results]:
    """Screens by features and by pixels, and their figures."""

    center = train.features.mean(axis=0)

    def directions(images: Collection) -> np.ndarray:
        # Features that are never negative all point one way: without their mean subtracted, their
        # cosines differ only in the third decimal.
        return privacy.unit(images.features - center)

    def thumbnails(images: Collection) -> np.ndarray:
        return privacy.unit_pixels(images.thumbnails(config.data.threads))

    screens, results = {}, {}
    for name, rows in (("features", directions), ("pixels", thumbnails)):
        three = (rows(synthetic), rows(held_out), rows(train))
        screens[name] = privacy.screen(*three, config.privacy.quantile)
    for name, s in screens.items():
        count = len(held_out.keys)
        results[f"privacy/{name}/threshold"] = {"value": s.threshold, "n": count}
        results[f"privacy/{name}/maximum"] = {"value": s.maximum, "n": count}
        entry = estimates.rate(s.flagged) | {"chance": s.expected}
        results[f"privacy/{name}/rate"] = entry
        above = estimates.rate(s.synthetic.similarity > s.maximum)
        results[f"privacy/{name}/above_maximum"] = above
    either = estimates.rate(np.logical_or.reduce([s.flagged for s in screens.values()]))
    return screens, results | {"privacy/rate": either}


def _leftovers(synthetic: Collection) -> Results:
    texts = {"prompt": synthetic.prompts.tolist(), "report": synthetic.reports.tolist()}
    return {
        f"leftovers/{kind}/{mark}": {"value": count, "n": len(strings)}
        for kind, strings in texts.items()
        for mark, count in privacy.leftovers(strings).items()
    }
