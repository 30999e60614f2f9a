"""Zero-shot classification: an image is compared with sentences that affirm or deny a finding."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsyn_jax.core import checks, estimates, log, metrics, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError, shortened
from medsyn_jax.data.loading.dataset import Source
from medsyn_jax.data.store import shards
from medsyn_jax.train import checkpoint, corpus, features, frozen

FREE = corpus.FREE
_SIDES = ("positive", "negative")
Prompts = Mapping[str, tuple[Sequence[str], Sequence[str]]]  # label -> positive, negative


def run(config: Any, workdir: Path) -> None:
    """Write the AUROC of each label that has prompts, their mean, and, with reports, retrieval.

    The score of a label is the cosine of the image with the mean of the affirming sentences, less
    that with the mean of the denying ones (each sentence and each mean of unit length), as in CLIP
    (arXiv 2103.00020, 3.1.4). Names: `test/auroc/<label>`, `test/auroc/mean`,
    `test/image_to_text/...`. Raises UserError for prompts of no label, and a test split without
    both classes of any.
    """
    run_folder = Path(config.encoder.workdir)
    checkpoint.check_run(run_folder)  # restored after the data are prepared
    prompts = read_prompts(Path(config.prompts))
    mesh = meshes.make_mesh(**config.mesh)
    folder = corpus.prepare(config.data.source, config.ingest, workdir.parent / "data")
    records = shards.open_split(folder, "test")
    labels = features.labels(records)
    names = usable(records.label_names, labels, prompts)
    pair = frozen.pretrained_pair(run_folder)
    outputs.write_config(workdir, config)
    source = Source(folder, "test", pair.sections, pair.tokenizer, pair.tokens, pair.size)
    image, text = frozen.embeddings(pair, source, mesh, config.data.batch_size, config.data.threads)
    subjects = np.array(source.subjects())
    results: dict[str, estimates.Estimate] = {}
    if names:
        columns = [records.label_names.index(name) for name in names]
        truth = np.where(labels[:, columns] == 1, 1, np.where(labels[:, columns] == 0, 0, -1))
        directions = np.stack([direction(pair, *prompts[name]) for name in names], axis=1)
        figures = metrics.aurocs((image @ directions)[None], truth, names, subjects)
        results = {
            f"test/auroc/{name}": figure.estimate() | {"chance": 0.5}
            for name, figure in figures.items()
        }
    if any(texts := source.texts()):
        found = metrics.retrieval(image @ text.T, np.array(texts), subjects)
        results |= {f"test/{name}": entry for name, entry in found.items()}
    outputs.write_results(workdir, "zeroshot", results)


CHECKS = (
    checks.numbers("count", "data", "batch_size"),
    checks.numbers("from 0", "data", "threads"),
    corpus.check_source,
    checks.files(
        lambda config: corpus.file("data.source", config.data.source) | {"prompts": config.prompts}
    ),
)


def read_prompts(path: Path) -> Prompts:
    """The prompts of a TOML file, tables of label with lists `positive` and `negative`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"config.prompts: {path}: cannot be read: {error}") from None
    prompts = {}
    for label, table in tables.items():
        lists = tuple(table.get(k) for k in _SIDES) if isinstance(table, dict) else ((), ())
        if not all(map(_are_sentences, lists)):
            raise UserError(
                f"config.prompts: {path}: {shortened(label)}: give lists of sentences `positive` "
                "and `negative`"
            )
        prompts[label] = lists
    return prompts


def _are_sentences(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(text, str) and text.strip() for text in value)


def usable(names: Sequence[str], labels: np.ndarray, prompts: Prompts) -> list[str]:
    """The labels with prompts and both classes in the test split; prints the others.

    labels: int8 [n, l]. Raises UserError if the set has labels, but none of them is usable.
    """
    both = (labels == 1).any(axis=0) & (labels == 0).any(axis=0)
    chosen = [n for n, b in zip(names, both, strict=True) if b and n in prompts]
    if names and not chosen:
        raise UserError(
            f"config.prompts: no label of the data set ({shortened(', '.join(names), 200)}) has "
            "both prompts and a positive and a negative record in the test split"
        )
    without = [n for n in names if n not in prompts]
    if without:
        log.say(f"no prompts, and so no figure: {', '.join(without)}")
    one_sided = [n for n, b in zip(names, both, strict=True) if not b and n in prompts]
    if one_sided:
        log.say(f"one class only in the test split, and so no figure: {', '.join(one_sided)}")
    return chosen


def direction(pair: frozen.Pair, positive: Sequence[str], negative: Sequence[str]) -> np.ndarray:
    """Float32 [d]: the mean of affirming sentences less that of denying ones, of unit length."""
    ends = []
    for sentences in (positive, negative):
        ids, mask = pair.tokenizer.encode(list(sentences), pair.tokens)
        blank = np.zeros((len(sentences), pair.size, pair.size), np.uint8)
        source = frozen.Arrays(image=blank, ids=ids, mask=mask)
        _, text = frozen.embeddings(pair, source, meshes.one_device(), len(sentences), 0)
        mean = text.mean(axis=0)
        ends.append(mean / np.linalg.norm(mean))
    return ends[0] - ends[1]
