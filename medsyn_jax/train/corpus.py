"""The shards of a run: the first process makes those that are missing, all processes read them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medsyn_jax.core import log
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading import loader
from medsyn_jax.data.sources import resolve
from medsyn_jax.data.store import shards
from medsyn_jax.data.text import tokenizers

FREE = ("mesh.", "data.threads", "data.batch_size", "ingest.workers")  # of evaluations


def prepare(source: str, ingest: Any, root: Path, name: str = "source") -> Path:
    """The directory of shards of `source`, below `root` if they had to be made.

    source: as of `resolve.prepare`. Only the first process looks at it: the others need to see the
    shards alone. name: tells the sources of a run apart. Raises UserError as `resolve.prepare`, on
    the first process.
    """
    first = jax.process_index() == 0
    directory = str(resolve.prepare(source, ingest, root)) if first else ""
    return Path(meshes.from_first(directory, name))


def file(field: str, source: str) -> dict[str, str]:
    """{field: path} of a source that is a file or folder, on the process that reads it."""
    return {field: source} if source != "phantom" and jax.process_index() == 0 else {}


def check_source(config: Any) -> None:
    """A rule of `core.checks`: `data.source` names something."""
    if not config.data.source:
        raise UserError(
            "config.data.source: is empty: give the folder of class folders, a CSV of pairs or an "
            "ingested data set, by --config.data.source=PATH"
        )


def files(config: Any) -> dict[str, str]:
    """`file` of every source of `config.data.sources`."""
    paths: dict[str, str] = {}
    for i, source in enumerate(config.data.sources):
        paths |= file(f"data.sources[{i}]", source)
    return paths


def check_labels(source: str, ingest: Any) -> None:
    """`resolve.check_labels`, on the process that reads the source."""
    if jax.process_index() == 0:
        resolve.check_labels(source, ingest)


def tokenizer(
    own: Path, folders: Sequence[Path], sections: Sequence[str], size: int, length: int
) -> Path:
    """The folder `own` of a WordPiece of `size` pieces, trained once on the training reports of
    all sources, `folders` of shards; other programs that open it cut texts at `length` tokens."""
    if jax.process_index() == 0 and not own.exists():
        splits = [shards.open_split(folder, "train") for folder in dict.fromkeys(folders)]
        texts = [text for split in splits for text in split.texts(sections)]
        part = own.with_name(f".{own.name}.{os.getpid()}.tmp")  # never a folder half written
        tokenizers.train_wordpiece(texts, size, part)
        path = part / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"model_max_length": length}
        path.write_text(json.dumps(config, indent=2) + "\n")
        part.rename(own)
    meshes.wait_for_all("tokenizer")
    return own


def check_leaks(sources: Sequence[str], folders: Sequence[Path]) -> None:
    """Raises UserError for a training split with a subject that the first source holds out.

    sources: their names. folders: of their shards.
    """
    if len(folders) == 1:
        return
    parts = shards.describe(folders[0])["splits"]
    kept = [s for s in ("valid", "test") if parts.get(s, {}).get("records")]
    subjects = {x for s in kept for x in shards.open_split(folders[0], s).subjects()}
    for name, folder in zip(sources[1:], folders[1:], strict=True):
        both = sorted(subjects.intersection(shards.open_split(folder, "train").subjects()))
        if both:
            raise UserError(
                f"config.data.sources: {name} trains on {len(both)} subjects, such as {both[0]}, "
                f"that {sources[0]} holds out for validation or test: ingest it with the same "
                "splits"
            )


def say_losses(name: str, source: loader.Source, most: int = 2000) -> None:
    """A line if more than 5 % of a source's texts are cut, or hold words that have no piece.

    Of at most `most` texts, evenly spread; only the first process looks."""
    if jax.process_index() != 0:
        return
    records, tokenizer, length = source.records, source.tokenizer, source.length
    some = np.unique(np.linspace(0, len(records) - 1, most, dtype=int))
    texts = [shards.text(records.features(int(i)), source.sections) for i in some]
    ids, mask = tokenizer.encode(texts, length + 1)
    unknown = str(getattr(tokenizer.backend.model, "unk_token", ""))
    unknowns = mask & (ids == tokenizer.backend.token_to_id(unknown))
    shares = {f"hold {unknown}": unknowns.any(1).mean()}
    if not source.random_sentence:
        shares |= {f"are cut at {length} tokens": mask[:, -1].mean()}
    if large := [f"{share:.0%} {what}" for what, share in shares.items() if share > 0.05]:
        log.say(f"{name}: of {len(texts)} training texts {' and '.join(large)}")
