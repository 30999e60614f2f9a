"""The tokenizer of a run with several sources, and what its sources are told of it."""

import csv

import numpy as np
import pytest
from PIL import Image

from configs import ingest
from medsyn_jax.data import tokenizers
from medsyn_jax.train import corpus

SECTIONS = ("findings", "impression")


def pairs(folder, words, count=40):
    """A CSV of noise and reports of these words, each in an order of its own."""
    folder.mkdir()
    rng = np.random.default_rng(len(words))
    rows = [("image", "report")]
    for n in range(count):
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{n}.png")
        rows.append((f"{n}.png", f"{' '.join(rng.permutation(words))}."))
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(folder / "pairs.csv")


@pytest.fixture
def folders(tmp_path):
    settings = ingest.get_config("smoke").ingest
    settings.update({"source": "pairs", "size": 8})
    named = {
        pairs(tmp_path / "films", ["the", "heart", "is", "small", "lungs", "clear"]): "films",
        pairs(tmp_path / "notes", ["fever", "und", "husten", "seit", "tagen"] * 4): "notes",
    }
    return {
        name: corpus.prepare(path, settings, tmp_path / "data", name)
        for path, name in named.items()
    }


def test_a_tokenizer_knows_the_words_of_all_sources_and_says_what_does_not_fit(
    folders, tmp_path, capsys
):
    both = corpus.tokenizer(tmp_path / "both", list(folders.values()), SECTIONS, 300, 16)
    first = corpus.tokenizer(tmp_path / "first", [folders["films"]], SECTIONS, 300, 16)
    twice = corpus.tokenizer(tmp_path / "twice", [folders["films"]] * 2, SECTIONS, 300, 16)
    assert {"heart", "husten"} <= tokenizers.load(both).backend.get_vocab().keys()
    assert (first / "vocab.txt").read_bytes() == (twice / "vocab.txt").read_bytes()
    capsys.readouterr()
    corpus.say_misfits(tokenizers.load(both), folders, SECTIONS, 32)
    assert capsys.readouterr().err == ""
    corpus.say_misfits(tokenizers.load(first), folders, SECTIONS, 16)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("notes: of ")
    assert line.endswith(
        "100% are cut at 16 tokens and 100% hold words that the tokenizer does not know"
    )
