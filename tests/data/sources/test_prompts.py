"""Prompts from every source, and the bad ones: one clear line, or a reject row with its number."""

import csv
import gzip

import pytest
from ml_collections import ConfigDict

from configs import common
from configs.generate import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import mimic_cxr, prompts, resolve
from medsyn_jax.data.store import shards
from medsyn_jax.data.text import tokenizers

SHARES = (0.5, 0.25, 0.25)
ALL = ("train", "valid", "test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = "no acute disease large right left pleural effusion small heart normal"
    return tokenizers.train_wordpiece([words] * 3, 300, tmp_path_factory.mktemp("t") / "t")


def columns(**changes):
    return ConfigDict(get_config("smoke").data.columns.to_dict() | changes)


def table(path, *lines, encoding="utf-8"):
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


def test_rows_become_prompts_with_all_that_their_columns_say(tmp_path, tokenizer):
    path = table(
        tmp_path / "p.csv",
        "words,id,who,part,pos,Effusion,Edema",
        '"FINDINGS: Effusion. IMPRESSION: Large effusion ___, right.",a/1,p1,train,ap,1,',
        "No acute disease.,b 2,p2,val,lateral,0.0,-1",
    )
    names = {"prompt": "words", "key": "id", "subject": "who", "split": "part", "view": "pos"}
    found = prompts.from_csv(path, columns(**names, labels=("Effusion", "Edema")), ALL, SHARES, 0)
    assert found.label_names == ("Effusion", "Edema")
    first, second = prompts.fit(found, tokenizer, 32).items
    assert first.key == "a/1"
    assert first.text == "FINDINGS: Effusion. IMPRESSION: Large effusion, right."
    assert first.report == "FINDINGS: Effusion. IMPRESSION: Large effusion ___, right."
    assert (first.findings, first.impression) == ("Effusion.", "Large effusion, right.")
    assert (first.subject, first.split, first.view, first.labels) == ("p1", "train", "AP", (1, -2))
    assert (second.key, second.split, second.view, second.labels) == ("b%202", "valid", "", (0, -1))


def test_marks_of_de_identification_are_taken_out_and_counted(tmp_path, tokenizer):
    lines = ["prompt", "No XXXX effusion.", "Heart of <HCW> [DATE] normal.", "Small heart."]
    lines.append('"INDICATION: Fever.\n\nNOTE: Supine [**Name**].\n\nNo effusion."')
    found = prompts.from_csv(table(tmp_path / "p.csv", *lines), columns(), ALL, SHARES, 0)
    fitted = prompts.fit(found, tokenizer, 32)
    assert fitted.marked == 3
    texts = ["No effusion.", "Heart of normal.", "Small heart."]
    assert [p.text for p in fitted.items][:3] == texts


def test_splits_are_drawn_by_subject(tmp_path):
    lines = [f"No disease {i}.,p{i // 4}" for i in range(80)]
    path = table(tmp_path / "p.csv", "prompt,subject", *lines)
    named = columns(subject="subject")
    items = prompts.from_csv(path, named, ALL, SHARES, 0).items
    homes = {(p.subject, p.split) for p in items}
    assert len(homes) == 20
    assert {split for _, split in homes} == {"train", "valid", "test"}
    assert [p.key for p in items[:2]] == ["row-2", "row-3"]
    assert prompts.from_csv(path, named, ALL, SHARES, 0, limit=7).items == items[:7]
    held = [p for p in items if p.split == "test"]
    assert prompts.from_csv(path, named, ("test",), SHARES, 0).items == held
    alone = table(tmp_path / "q.csv", "prompt,split", "Effusion.,train")
    with pytest.raises(UserError, match=r"q\.csv: no row in the splits valid, test"):
        prompts.from_csv(alone, columns(split="split"), ("valid", "test"), SHARES, 0)


def test_a_column_without_a_name_is_none_that_was_asked_for(tmp_path):
    """As pandas writes the index of a table, unless told not to."""
    path = table(tmp_path / "p.csv", ",prompt", "0,Effusion.", "1,Edema.")
    items = prompts.from_csv(path, columns(), ALL, SHARES, 0).items
    assert [(p.key, p.subject) for p in items] == [("row-2", "row-2"), ("row-3", "row-3")]


def test_bad_rows_are_rejects_and_the_others_stay(tmp_path, tokenizer):
    path = table(
        tmp_path / "p.csv",
        "prompt,key,Edema",
        "No disease.,a,0",
        ",b,0",
        '" ___ . ",c,0',
        "Again.,a,0",
        "Edema.,d,maybe",
        "Small\x00 effusion\x1b[31m.,e,1",
    )
    found = prompts.from_csv(path, columns(key="key", labels=("Edema",)), ALL, SHARES, 0)
    found = prompts.fit(found, tokenizer, 32)
    assert [p.key for p in found.items] == ["a", "e"]
    assert found.items[1].text == "Small effusion [31m."
    assert found.control_characters == 1
    assert found.rejects == [
        ("a", f"{path}: row 5: key a was listed before"),
        ("d", f"{path}: row 6: column 'Edema': 'maybe' is not 1, 0, -1 or empty"),
        ("b", "the prompt is empty"),
        ("c", "the prompt is empty"),
    ]


@pytest.mark.parametrize(
    ("text", "encoding", "told"),
    [
        ("prompt,key\nfine,1\nÖdem,2\n", "latin-1", r"p\.csv: row 3: column 'prompt' is not UTF-8"),
        ("prompt,key\nfine,1\nno, comma,2\n", "utf-8", r"p\.csv: row 3: has 3 fields where"),
        (
            "text,key\nfine,1\n",
            "utf-8",
            r"p\.csv: no column 'prompt' among: text, key: set --config.data.columns.prompt",
        ),
        ("prompt,key\n,1\n", "utf-8", "prompts: none can be used, 1 were rejected, first: row-2"),
    ],
)
def test_a_table_that_cannot_be_used_is_told_in_one_line(tmp_path, tokenizer, text, encoding, told):
    path = table(tmp_path / "p.csv", text, encoding=encoding)
    with pytest.raises(UserError, match=told) as raised:
        prompts.fit(prompts.from_csv(path, columns(), ALL, SHARES, 0), tokenizer, 32)
    assert "\n" not in str(raised.value)


def test_long_prompts_are_cut_off_behind_a_word(tokenizer):
    def fitted(text, length=77):
        only = prompts.Prompts([prompts.Prompt("k", "s", "train", text)], (), [])
        found = prompts.fit(only, tokenizer, length)
        return found.items[0].text, found.truncated

    long = "Large right pleural effusion. " * 400  # 2,000 tokens
    text, truncated = fitted(long)
    assert truncated == 1
    assert text == " ".join(long.split()[:60])  # 15 x 5 tokens and the two marks
    assert fitted(text) == (text, 0)
    # All 77 tokens are made use of: one word less fits, one more does not.
    _, mask = tokenizer.encode([text, " ".join(long.split()[:61])], 100)
    assert mask.sum(1).tolist() == [77, 78]
    letters, truncated = fitted("effusion" * 12, 20)
    assert truncated == 1
    assert len(letters) > 18
    assert ("effusion" * 12).startswith(letters)


def test_shards_give_the_sections_asked_for(tmp_path, tokenizer):
    folder = resolve.prepare("phantom", common.phantom(size=32, subjects=20), tmp_path)
    found = prompts.from_shards(folder, ("train", "test"), ("impression",))
    records = [
        r
        for s in ("train", "test")
        for r in map(
            shards.open_split(folder, s).__getitem__, range(len(shards.open_split(folder, s)))
        )
    ]
    assert [p.key for p in found.items] == [r["key"] for r in records]
    for prompt, record in zip(found.items, records, strict=True):
        assert prompt.labels == tuple(record["labels"].tolist())
        assert prompt.text == record["impression"] or not record["impression"]
        assert (prompt.report, prompt.view) == (record["report"], record["view"])
    fitted = prompts.fit(found, tokenizer, 512)
    assert (fitted.items, fitted.truncated, fitted.rejects) == (found.items, 0, [])
    assert prompts.from_shards(folder, ("test", "train"), (), limit=3).items[0].split == "test"
    with pytest.raises(UserError, match="no record in the splits none"):
        prompts.from_shards(folder, ("none",), ("impression",))


def test_reports_of_mimic_cxr_need_no_image(tmp_path):
    names = mimic_cxr.LABELS
    root, studies = tmp_path / "mimic", [("10000001", "train"), ("10000002", "validate")]
    rows = {"metadata": [["dicom_id", "subject_id", "study_id", "ViewPosition"]]}
    rows |= {"split": [["dicom_id", "study_id", "subject_id", "split"]]}
    rows |= {"chexpert": [["subject_id", "study_id", *names]]}
    for i, (subject, part) in enumerate(studies):
        folder = root / "files" / "p10" / f"p{subject}"
        folder.mkdir(parents=True)
        (folder / f"s5{i}.txt").write_text(f" FINDINGS: Wet.\n\n IMPRESSION: Edema {i} of ___.\n")
        for view in ("PA", "LATERAL", "AP"):
            rows["metadata"].append([f"{view}{i}", subject, f"5{i}", view])
            rows["split"].append([f"{view}{i}", f"5{i}", subject, part])
        rows["chexpert"].append([subject, f"5{i}", "1.0", *[""] * (len(names) - 1)])
    (root / "files" / "p10" / "p10000002" / "s51.txt").write_bytes(b"IMPRESSION: \xd6dem.")
    for name, lines in rows.items():
        with gzip.open(root / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt", newline="") as file:
            csv.writer(file).writerows(lines)
    assert prompts.is_mimic(root)
    found = prompts.from_mimic(root, "", ALL, ("impression",))
    assert [p.key for p in found.items] == [f"p10/p10000001/s50/{v}0" for v in ("PA", "AP")]
    first = found.items[0]
    assert (first.text, first.findings, first.view) == ("Edema 0 of.", "Wet.", "PA")
    assert (first.subject, first.split, first.labels[0]) == ("10000001", "train", 1)
    assert [key for key, _ in found.rejects] == [f"p10/p10000002/s51/{v}1" for v in ("PA", "AP")]
    assert "s51.txt: the report is not UTF-8 at byte 12" in found.rejects[0][1]
    part = prompts.from_mimic(root, "", ("train",), ("impression",))
    assert (part.items, part.rejects) == (found.items, [])
    with pytest.raises(UserError, match=r"no frontal image in the splits test"):
        prompts.from_mimic(root, "", ("test",), ("impression",))
    (root / "files" / "p10" / "p10000001" / "s50.txt").unlink()
    (root / "files" / "p10" / "p10000002" / "s51.txt").unlink()
    with pytest.raises(UserError, match=r"no report: .*set data\.reports"):
        prompts.from_mimic(root, "", ALL, ("impression",))
    with gzip.open(root / "mimic-cxr-2.0.0-metadata.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([rows["metadata"][0], rows["metadata"][2]])
    with pytest.raises(UserError, match=r"prompts: .*: its tables list no frontal image: check"):
        prompts.from_mimic(root, "", ALL, ("impression",))
