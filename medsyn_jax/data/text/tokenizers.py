"""Text to word-piece ids, by any Hugging Face tokenizer folder or one trained on the corpus."""

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

# The loader's threads are parallel already; a pool of threads inside each would get in their way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Ids of texts at a fixed length; safe to use from several threads."""

    backend: tokenizers.Tokenizer
    pad_id: int
    pad_token: str
    folder: Path

    @property
    def vocab_size(self) -> int:
        """The smallest embedding table that holds every id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts as [CLS] pieces [SEP], cut or padded to `length`.

        Args:
            texts: b texts; '' gives the special tokens alone.
            length: tokens a text, special tokens included.

        Returns:
            ids int32[b, length], and mask bool[b, length], True on real tokens. A text that is
            too long keeps its start and its [SEP].
        """
        found = self._fixed(length).encode_batch_fast(list(texts))
        return _arrays(found, length)

    def encode_words(
        self, texts: Sequence[str], length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`encode`, and which word each piece is of, for sums over the pieces of a word.

        Returns:
            ids, mask, and words int32[b, length]: 0 for [CLS], 1, 2, ... for the words (what the
            tokenizer splits before it looks for pieces), one more for [SEP], and -1 for padding.
        """
        found = self._fixed(length).encode_batch(list(texts))  # the fast one forgets words
        ids, mask = _arrays(found, length)
        words = np.full(ids.shape, -1, np.int32)
        for row, encoding in zip(words, found, strict=True):
            own = np.array([-1 if word is None else word for word in encoding.word_ids])
            ended = np.cumsum(encoding.special_tokens_mask) > 1  # from [SEP] on
            row[:] = np.where(ended, own.max() + 2, own + 1)
        return ids, mask, np.where(mask, words, -1)

    def _fixed(self, length: int) -> tokenizers.Tokenizer:
        return _fixed(self.backend, self.pad_id, self.pad_token, length)


def _arrays(found: list[tokenizers.Encoding], length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([e.ids for e in found], np.int32).reshape(len(found), length)
    return ids, np.array([e.attention_mask for e in found], bool).reshape(len(found), length)


@functools.lru_cache(maxsize=16)
def _fixed(
    backend: tokenizers.Tokenizer, pad_id: int, pad_token: str, length: int
) -> tokenizers.Tokenizer:
    # Length is a setting of the object, and setting it while another thread encodes fails.
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.enable_truncation(length)
    copy.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token)
    return copy


def load(folder: Path | str) -> Tokenizer:
    """Opens a tokenizer folder without any network, and without running code of the folder.

    Args:
        folder: what `save_pretrained` wrote, or a model folder with its tokenizer; a folder with
            `vocab.txt` alone (Bio_ClinicalBERT) is an uncased BERT tokenizer, as `transformers`
            takes it to be and as the published encoders were trained. Where a folder names a class
            of its own (CXR-BERT), its `tokenizer.json` or `vocab.txt` is read all the same.

    Raises:
        UserError: naming the folder when there is no tokenizer in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"tokenizer: {folder}: no such folder: give a Hugging Face tokenizer folder"
        )
    try:
        backend, pad_token = _open(folder)
        ids = backend.get_vocab(with_added_tokens=True).values()
        # Fails without a piece for the unknown.
        marks = backend.encode("No effusion \N{SNOWMAN} 9").special_tokens_mask
        if len(marks) < 3 or not marks[0] or not marks[-1]:
            raise ValueError("puts no special token before and after a text, as a BERT's does")
        if max(ids) > 2 * len(ids) + 1000:
            raise ValueError(f"ids up to {max(ids)} for {len(ids)} pieces")
    except Exception as error:  # of damaged files the parsers raise this or that, also plain ones
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
    """The tokenizer of a folder, and its token for padding or None."""
    # Imported here: it takes seconds, more where torch is installed, and workers do without.
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
        if not any((folder / name).is_file() for name in files):  # transformers makes one up
            raise ValueError(f"has no {' or '.join(dict.fromkeys(files))}")
        return opened.backend_tokenizer, opened.pad_token
    named = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in (special | settings).items()
    }
    if (file := folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(file))
        return backend, named.get("pad_token") or (backend.padding or {}).get("pad_token", "[PAD]")
    options = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    options += tuple(f"{name}_token" for name in ("unk", "sep", "pad", "cls", "mask"))
    given: dict[str, Any] = {key: named[key] for key in options if named.get(key) is not None}
    opened = transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), **given)
    return opened.backend_tokenizer, opened.pad_token


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    found = json.loads(file.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} must hold one JSON object")
    return found


def train_wordpiece(texts: Iterable[str], vocab_size: int, folder: Path | str) -> Tokenizer:
    """Learns an uncased BERT word-piece vocabulary and saves it as a Hugging Face folder.

    The same texts give the same vocabulary in any order, on any number of threads.

    Args:
        texts: the corpus; use the training split only.
        vocab_size: upper bound of the number of pieces, special tokens included.
        folder: where `tokenizer.json`, `vocab.txt` and the like are written.

    Raises:
        UserError: when the corpus is empty or the vocabulary too small for its letters.
    """
    from transformers import BertTokenizer

    texts = list(texts)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers "##a", "##b", ... in the order of a hash map that differs from run to run,
    # and settles ties by these numbers; given in advance, they are the same in every run.
    letters = sorted({f"##{c}" for word in _words(tokenizer, texts) for c in word[1:]})
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
            f"are {len(pieces)} pieces by themselves: give more"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(pieces, key=pieces.__getitem__)
    vocab = folder / "vocab.txt"
    vocab.write_text("".join(f"{piece}\n" for piece in ordered), encoding="utf-8")
    BertTokenizer(vocab=str(vocab), do_lower_case=True).save_pretrained(folder)
    return load(folder)


def _words(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> set[str]:
    return {
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(text)
        )
    }
