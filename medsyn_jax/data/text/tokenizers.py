"""Texts to word-piece ids, with a Hugging Face tokenizer folder or one trained on the corpus."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from medsyn_jax.core.errors import UserError, reason

# The loader's threads are parallel already; a thread pool in each of them would slow them down.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that encodes texts at a fixed length; safe for use in several threads."""

    backend: tokenizers.Tokenizer
    pad_id: int
    pad_token: str
    folder: Path

    @property
    def vocab_size(self) -> int:
        """Rows of the smallest embedding table that holds every id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts as [CLS] pieces [SEP], cut or padded to `length`.

        Args:
            texts: b texts; '' gives the special tokens alone.
            length: tokens per text, special tokens included.

        Returns:
            ids int32[b, length], and mask bool[b, length], True on real tokens. A text that is
            too long keeps its start and its [SEP].
        """
        return _arrays(_fixed(self, length).encode_batch_fast(list(texts)), length)

    def encode_words(
        self, texts: Sequence[str], length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode texts like `encode`, and number the word of each piece, for sums over words.

        Returns:
            ids, mask, and words int32[b, length]: 0 for [CLS], 1, 2, ... for the words into which
            the tokenizer splits a text before its pieces, the next number for [SEP], and -1 for
            padding.
        """
        encodings = _fixed(self, length).encode_batch(list(texts))  # the fast one forgets words
        ids, mask = _arrays(encodings, length)
        words = np.full(ids.shape, -1, np.int32)
        for row, encoding in zip(words, encodings, strict=True):
            numbers = np.array([-1 if word is None else word for word in encoding.word_ids])
            ended = np.cumsum(encoding.special_tokens_mask) > 1  # from [SEP] on
            row[:] = np.where(ended, numbers.max() + 2, numbers + 1)
        return ids, mask, np.where(mask, words, -1)


def _arrays(encodings: Sequence[tokenizers.Encoding], length: int) -> tuple[np.ndarray, np.ndarray]:
    shape = len(encodings), length
    ids = np.array([e.ids for e in encodings], np.int32).reshape(shape)
    return ids, np.array([e.attention_mask for e in encodings], bool).reshape(shape)


@functools.lru_cache(maxsize=16)
def _fixed(tokenizer: Tokenizer, length: int) -> tokenizers.Tokenizer:
    """A copy for one length: the length is a setting of the object, and not safe in threads."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    copy.enable_truncation(length)
    copy.enable_padding(length=length, pad_id=tokenizer.pad_id, pad_token=tokenizer.pad_token)
    return copy


def load(folder: Path | str) -> Tokenizer:
    """Open a tokenizer folder without network access and without running the folder's code.

    Args:
        folder: a folder written by `save_pretrained`, or a model folder with its tokenizer. A
            folder with `vocab.txt` alone (Bio_ClinicalBERT) is an uncased BERT tokenizer, as in
            `transformers` and in the training of the published encoders. A folder with a tokenizer
            class of its own (CXR-BERT) is read from `tokenizer.json` or `vocab.txt`.

    Raises:
        UserError: the folder holds no usable tokenizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"tokenizer: {folder}: no such folder: give a Hugging Face tokenizer folder"
        )
    try:
        backend, pad_token = _open(folder)
        ids = backend.get_vocab(with_added_tokens=True).values()
        # The encoding fails if the vocabulary has no piece for unknown characters.
        marks = backend.encode("No effusion \N{SNOWMAN} 9").special_tokens_mask
        if len(marks) < 3 or not marks[0] or not marks[-1]:
            raise ValueError("puts no special token before and after a text, as a BERT's does")
        if max(ids) > 2 * len(ids) + 1000:
            raise ValueError(f"ids up to {max(ids)} for {len(ids)} pieces")
    except Exception as error:  # the parsers raise any class, even Exception, for damaged files
        raise UserError(
            f"tokenizer: {folder}: holds no tokenizer that can be opened ({reason(error, 120)}): "
            "it needs tokenizer.json, or vocab.txt"
        ) from error
    pad_id = None if pad_token is None else backend.token_to_id(str(pad_token))
    if pad_id is None:
        raise UserError(
            f"tokenizer: {folder}: has no pad token: use another one, or name its pad_token in "
            "tokenizer_config.json"
        )
    return Tokenizer(backend, pad_id, str(pad_token), folder)


def _open(folder: Path) -> tuple[tokenizers.Tokenizer, Any]:
    """The tokenizer of a folder, and its padding token or None."""
    # The import takes seconds, more where torch is installed; worker processes do not need it.
    import transformers

    special, settings, model = (
        _read_object(folder / f"{name}.json")
        for name in ("special_tokens_map", "tokenizer_config", "config")
    )
    kind, cls = model.get("model_type", ""), settings.get("tokenizer_class")
    known = hasattr(transformers, str(cls)) if cls else kind in transformers.CONFIG_MAPPING
    if known and "auto_map" not in settings and "auto_map" not in model:
        opened = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        files = ("tokenizer.json", *opened.vocab_files_names.values())
        if not any((folder / name).is_file() for name in files):  # transformers invents one
            raise ValueError(f"has no {' or '.join(dict.fromkeys(files))}")
        return opened.backend_tokenizer, opened.pad_token
    settings = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in (special | settings).items()
    }
    if (file := folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(file))
        default = (backend.padding or {}).get("pad_token", "[PAD]")
        return backend, settings.get("pad_token") or default
    names = ["do_lower_case", "strip_accents", "tokenize_chinese_chars"]
    names += [f"{token}_token" for token in ("unk", "sep", "pad", "cls", "mask")]
    options: dict[str, Any] = {n: settings[n] for n in names if settings.get(n) is not None}
    opened = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), **options)
    return opened.backend_tokenizer, opened.pad_token


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} must hold one JSON object")
    return content


def train_wordpiece(texts: Iterable[str], vocab_size: int, folder: Path | str) -> Tokenizer:
    """Learn an uncased BERT word-piece vocabulary and save it as a Hugging Face folder.

    The same texts give the same vocabulary in any order and with any number of threads.

    Args:
        texts: the corpus; use the training split only.
        vocab_size: upper bound of the number of pieces, special tokens included.
        folder: destination of `tokenizer.json`, `vocab.txt` and the settings.

    Raises:
        UserError: the corpus is empty, or the vocabulary too small for its letters.
    """
    from transformers import BertTokenizer

    texts = list(texts)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers "##a", "##b", ... in the order of a hash map that differs from run to run,
    # and settles ties by these numbers; special tokens have the same numbers in each run.
    normalize, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    letters = sorted({f"##{character}" for word in words for character in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL, *letters],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = tokenizer.get_vocab()
    if not letters:
        raise UserError("tokenizer: the corpus has no text to learn a vocabulary from")
    if len(pieces) > vocab_size:
        raise UserError(
            f"tokenizer: vocab_size={vocab_size}: too small for the letters of the corpus, which "
            f"alone are {len(pieces)} pieces: raise vocab_size"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(pieces, key=pieces.__getitem__)
    vocab = folder / "vocab.txt"
    vocab.write_text("".join(f"{piece}\n" for piece in ordered), encoding="utf-8")
    BertTokenizer(vocab=str(vocab), do_lower_case=True).save_pretrained(folder)
    return load(folder)
