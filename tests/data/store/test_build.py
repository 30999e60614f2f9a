import csv
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import ingestion, pairs, plan, resolve
from medsyn_jax.data.sources.ingestion import ingest
from medsyn_jax.data.store import build, shards
from medsyn_jax.data.store.items import Listing
from tests.data.conftest import write_rows


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.glob("[!.]*.array_record*"))}


def times(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in directory.glob("[!.]*.array_record*")}


def all_keys(directory: Path) -> list[str]:
    info = shards.describe(directory)["splits"]
    return [k for s in info if info[s]["records"] for k in shards.open_split(directory, s).keys]


def rejects(directory: Path) -> dict[str, str]:
    with (directory / "rejects.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["key", "reason"]
    return dict(rows)


def test_a_second_run_changes_nothing(make_pairs, tmp_path):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    before = times(directory)
    assert ingest(config, directory) == directory
    assert times(directory) == before


def test_processes_write_the_same_bytes(make_pairs, tmp_path):
    config = make_pairs()
    one = snapshot(ingest(config, tmp_path / "one"))
    config.workers = 2
    assert snapshot(ingest(config, tmp_path / "two")) == one


def test_a_killed_run_keeps_its_shards_and_ends_the_same(make_pairs, tmp_path):
    config = make_pairs()
    whole = ingest(config, tmp_path / "whole")
    cut = tmp_path / "cut"
    program = f"""
import os, signal
from medsyn_jax.data.sources import ingestion, pairs
from ml_collections import ConfigDict
made, make = [], pairs.make
def dying(item, config):
    if len(made) == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(item)
    return make(item, config)
pairs.make = dying
ingestion.ingest(ConfigDict({config.to_dict()!r}), {str(cut)!r})
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(list(cut.glob(".*.tmp"))) == 1
    before = times(cut)
    assert len(before) == 2
    with pytest.raises(UserError, match=r"cut: holds no data set"):
        shards.open_split(cut, "train")
    ingest(config, cut)
    assert snapshot(cut) == snapshot(whole)
    assert {name: t for name, t in times(cut).items() if name in before} == before
    assert not list(cut.rglob("*.tmp"))
    assert (cut / "medsyn.json").read_bytes() == (whole / "medsyn.json").read_bytes()


def test_another_source_in_the_same_directory_is_refused(make_pairs, tmp_path):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    before = snapshot(directory)
    config.min_tokens = 4
    with pytest.raises(UserError, match=r"another data set .min_tokens was 3, is 4."):
        ingest(config, directory)
    config.min_tokens = 3
    image = Path(config.path).parent / "img" / "003.png"
    image.write_bytes(image.read_bytes() + b"longer")
    with pytest.raises(UserError, match="the records or files of the source have"):
        ingest(config, directory)
    assert snapshot(directory) == before


def test_moving_the_source_and_the_speed_do_not_change_the_fingerprint(make_pairs, tmp_path):
    config = make_pairs()
    fingerprint = plan.make_plan(config).fingerprint
    shutil.move(Path(config.path).parent, tmp_path / "moved")
    config.update({"path": str(tmp_path / "moved" / "pairs.csv"), "workers": 7})
    config.max_reject_share = 0.5
    assert plan.make_plan(config).fingerprint == fingerprint
    config.seed = 1
    assert plan.make_plan(config).fingerprint != fingerprint


def test_where_the_reports_of_mimic_lie_is_not_content():
    config = get_config("paper").ingest
    before = plan._settings(config)
    config.mimic_cxr.reports = "elsewhere"
    assert plan._settings(config) == before
    assert config.mimic_cxr.reports == "elsewhere"


def test_a_fingerprint_covers_the_ends_of_each_file_but_not_its_inside(make_pairs):
    config = make_pairs(size=128)
    image = Path(config.path).parent / "img" / "003.png"
    whole = image.read_bytes()
    assert len(whole) > 2 * 4096 + 100
    found = []
    for place in (None, 50, len(whole) // 2, -50, -4096, 4096):
        changed = bytearray(whole)
        if place is not None:
            changed[place] ^= 1
        image.write_bytes(changed)
        found.append(plan.make_plan(config).fingerprint)
    first, head, inside, tail, last, behind = found
    assert first == inside == behind
    assert len({first, head, tail, last}) == 4


def test_a_set_is_named_by_its_records_version_and_not_by_code(make_pairs, monkeypatch):
    config = make_pairs()
    first = plan.make_plan(config).fingerprint
    monkeypatch.setattr(plan, "RECORDS_VERSION", plan.RECORDS_VERSION + 1)
    assert plan.make_plan(config).fingerprint != first


def test_a_setting_that_is_new_keeps_the_name_while_records_are_as_before(make_pairs, monkeypatch):
    config = make_pairs()
    first = plan.make_plan(config).fingerprint
    monkeypatch.setattr(plan, "_LATER", {"clahe": False})
    with config.unlocked():
        config.clahe = False
    assert plan.make_plan(config).fingerprint == first
    config.clahe = True
    assert plan.make_plan(config).fingerprint != first


def as_of_format_1(directory: Path) -> None:
    """Names the set as versions did that hashed their own code."""
    for name in ("plan.json", "medsyn.json"):
        path = directory / name
        if path.exists():
            found = json.loads(path.read_text())
            del found["settings"]["records_version"]
            path.write_text(json.dumps(found | {"fingerprint": 64 * "c"}))


@pytest.mark.parametrize("cut", [False, True])
def test_a_set_of_an_earlier_version_is_kept_and_completed(make_pairs, tmp_path, capsys, cut):
    config, root = make_pairs(), tmp_path / "data"
    now = resolve.prepare(config.path, config, root)
    written = snapshot(now)
    old = now.rename(root / "pairs-cccccccc")
    as_of_format_1(old)
    if cut:
        next(old.glob("*train*.array_record*")).unlink()
        (old / "medsyn.json").unlink()
    assert resolve.prepare(config.path, config, root) == old
    assert snapshot(old) == written
    assert shards.describe(old)["fingerprint"] == 64 * "c"
    assert "is of an earlier version" in capsys.readouterr().err
    # In its own directory, too; with other settings or records it is another set.
    assert ingest(config, old) == old
    config.min_tokens = 4
    assert resolve.prepare(config.path, config, root) != old
    with pytest.raises(UserError, match=r"another data set .min_tokens was 3, is 4"):
        ingest(config, old)
    config.min_tokens = 3
    with Path(config.path).open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    write_rows(Path(config.path), rows[:-1])
    assert resolve.prepare(config.path, config, root) != old


def test_a_directory_of_something_else_is_refused(make_pairs, tmp_path):
    config = make_pairs()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="full: is not empty"):
        ingest(config, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"
    with pytest.raises(UserError, match=r"thesis\.tex: is not a directory"):
        ingest(config, tmp_path / "full" / "thesis.tex")
    config.source = "dicomweb"
    with pytest.raises(UserError, match="'dicomweb': unknown, use one of phantom, pairs"):
        ingest(config, tmp_path / "out")


def test_unusable_records_become_reject_rows(make_pairs, tmp_path):
    config = make_pairs(count=60)
    folder = Path(config.path).parent
    (folder / "img" / "004.png").unlink()
    (folder / "img" / "010.png").write_bytes(b"")
    whole = (folder / "img" / "011.png").read_bytes()
    (folder / "img" / "011.png").write_bytes(whole[: len(whole) // 2])
    config.max_reject_share = 0.1
    directory = ingest(config, tmp_path / "out")
    found = rejects(directory)
    assert sorted(found) == ["img/004.png", "img/010.png", "img/011.png"]
    assert all(key in reason for key, reason in found.items())
    keys = all_keys(directory)
    assert len(keys) == len(set(keys)) == 57
    assert not set(keys) & set(found)
    assert shards.describe(directory)["rejects"] == 3


def test_the_index_column_that_pandas_writes_is_no_split(make_pairs, tmp_path):
    """Its name is empty, as are the names of columns that nobody asked for."""
    config = make_pairs()
    table = Path(config.path)
    first, *rest = table.read_text().splitlines()
    table.write_text("\n".join([f",{first}", *(f"{i},{row}" for i, row in enumerate(rest))]))
    directory = ingest(config, tmp_path / "out")
    assert len(all_keys(directory)) == 24
    assert not rejects(directory)


def test_bits_of_the_source_reach_its_images(make_pairs, tmp_path):
    config = make_pairs()
    image = Path(config.path).parent / "img" / "004.png"
    for record, top in ((4, 4095), (5, 1000), (6, 5000)):
        pixels = np.linspace(0, top, 256).astype(np.uint16).reshape(16, 16)
        Image.fromarray(pixels).save(image.with_name(f"{record:03d}.png"))
    config.update({"bits": 12, "split_shares": (1.0, 0.0, 0.0)})
    directory = ingest(config, tmp_path / "out")
    assert (
        "img/006.png: a pixel of 5000, more than ingest.bits=12"
        in rejects(directory)["img/006.png"]
    )
    data = shards.open_split(directory, "train")
    tops = {data.keys[i]: data[i]["image"].max() for i in range(len(data))}
    assert (tops["img/004.png"], tops["img/005.png"]) == (255, 62)
    config.bits = 17
    with pytest.raises(UserError, match=r"ingest\.bits: 17: use 8 to 16"):
        ingest(config, tmp_path / "other")


@pytest.mark.parametrize("field", ["square", "display"])
def test_a_setting_of_images_that_does_not_exist(make_pairs, tmp_path, field):
    config = make_pairs()
    config[field] = "zoom"
    with pytest.raises(UserError, match=rf"ingest\.{field}: 'zoom': use one of (pad|window), "):
        ingest(config, tmp_path / "out")


def test_a_short_report_is_left_out_without_counting_as_a_fault(make_pairs, tmp_path):
    config = make_pairs()
    table = Path(config.path)
    text = table.read_text()
    for i in (2, 3, 9, 10, 17):
        text = text.replace(f"The lungs of number {i} are clear.", "Clear.")
        text = text.replace(f"No finding {i}.", "")
    table.write_text(text)
    config.max_reject_share = 0.0
    directory = ingest(config, tmp_path / "out")
    info = shards.describe(directory)
    assert info["rejects"] == 0
    assert info["left_out"] == {"report too short": 5}
    assert sorted(rejects(directory)) == [f"img/{i:03d}.png" for i in (2, 3, 9, 10, 17)]
    assert len(all_keys(directory)) == 19


def share_a_text(config, text, numbers):
    """Gives the records of these numbers one report."""
    table = Path(config.path)
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    for i in numbers:
        rows[i][1] = text
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_distinct_texts_and_marks_are_told(make_pairs, tmp_path, capsys):
    config = make_pairs(count=30, workers=2)
    share_a_text(config, "FINDINGS: The lungs of XXXX are clear since [DATE].", range(4))
    directory = ingest(config, tmp_path / "out")
    told = "27 distinct texts in 30 reports, marks of de-identification taken out of 4\n"
    assert told in capsys.readouterr().err
    victim = sorted(snapshot(directory))[1]
    (directory / victim).unlink()
    ingest(config, directory)  # what complete shards hold is counted, too
    assert told in capsys.readouterr().err
    ingest(config, directory)
    assert "distinct texts" not in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_one_text_for_too_many_records_stops_the_run(make_pairs, tmp_path, workers):
    config = make_pairs(count=60, workers=workers, records_per_shard=20)
    boilerplate = "Every image was looked at by somebody. " * 4
    share_a_text(config, f"IMPRESSION: {boilerplate}", range(13))  # 12 are a fifth
    for _ in range(2):  # and again from the shards that are complete
        with pytest.raises(UserError, match=r"13 of 60 records read 'Every image .* in five") as e:
            ingest(config, tmp_path / "out")
        assert "\n" not in str(e.value)
        assert len(str(e.value)) < 400
    assert not (tmp_path / "out" / "medsyn.json").exists()
    share_a_text(config, "IMPRESSION: Another one for the twelfth record.", [12])
    assert len(all_keys(ingest(config, tmp_path / "enough"))) == 60


def test_one_text_for_nearly_all_records_stops_the_run_early(make_pairs, tmp_path, monkeypatch):
    config, tried, make = make_pairs(count=200), [], pairs.make

    def counted(item, config):
        tried.append(item.key)
        return make(item, config)

    monkeypatch.setattr(pairs, "make", counted)
    share_a_text(config, "IMPRESSION: I wrote the same of every single record.", range(150))
    with pytest.raises(UserError, match="records read 'I wrote the same"):
        ingest(config, tmp_path / "out")
    assert 50 <= len(tried) < 70


@pytest.mark.parametrize(("count", "text"), [(49, "A text of more than five words."), (60, "No.")])
def test_few_records_and_short_texts_may_be_alike(make_pairs, tmp_path, count, text):
    config = make_pairs(count=count, min_tokens=1)
    share_a_text(config, f"IMPRESSION: {text}", range(count))
    assert len(all_keys(ingest(config, tmp_path / "out"))) == count


def test_a_run_that_wrote_nothing_does_not_hold_its_directory(make_pairs, tmp_path):
    config = make_pairs()
    directory = tmp_path / "out"
    wrong = config.copy_and_resolve_references()
    wrong.path = str(tmp_path / "elsewhere.csv")
    (tmp_path / "elsewhere.csv").write_text(Path(config.path).read_text())
    with pytest.raises(UserError, match=r"of 24 records were rejected|of 5 records were rejected"):
        ingest(wrong, directory)
    ingest(config, directory)
    assert len(all_keys(directory)) == 24


def test_a_record_is_never_written_twice(make_pairs, tmp_path, monkeypatch):
    config = make_pairs()
    listed = pairs.list_items

    def doubled(config):
        listing = listed(config)
        return Listing(listing.items + listing.items[3:4], listing.label_names)

    monkeypatch.setattr(pairs, "list_items", doubled)
    directory = ingest(config, tmp_path / "out")
    assert list(rejects(directory)) == ["img/003.png"]
    assert "was listed before" in rejects(directory)["img/003.png"]
    assert sorted(all_keys(directory)) == [f"img/{i:03d}.png" for i in range(24)]


def test_too_many_rejects_stop_the_run_early_and_keep_what_is_written(
    make_pairs, tmp_path, monkeypatch
):
    config = make_pairs(count=200)
    folder, tried, make = Path(config.path).parent, [], pairs.make

    def counted(item, config):
        tried.append(item.key)
        return make(item, config)

    monkeypatch.setattr(pairs, "make", counted)
    for i in range(0, 200, 5):
        (folder / "img" / f"{i:03d}.png").unlink()
    directory = tmp_path / "out"
    with pytest.raises(UserError, match=r"max_reject_share=0\.05 allows.*rejects\.csv"):
        ingest(config, directory)
    assert len(tried) < 120
    kept = times(directory)
    assert kept
    assert rejects(directory).keys() == {k for k in tried if int(k[4:7]) % 5 == 0}
    config.max_reject_share = 0.3
    ingest(config, directory)
    assert kept.items() <= times(directory).items()
    assert len(all_keys(directory)) == 160


def test_rows_that_the_listing_rejects_are_no_sample_of_the_rest(make_pairs, tmp_path):
    config = make_pairs(count=200)
    table = Path(config.path)
    with table.open(newline="") as file:
        head, *rows = csv.reader(file)
    for row in rows[:36:4]:
        row[3] = "odd"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    directory = ingest(config, tmp_path / "out")
    assert shards.describe(directory)["rejects"] == 9  # of 200, below max_reject_share


def test_a_rejected_share_that_is_allowed_does_not_stop_early():
    assert not ingestion._too_many(rejected=5, tried=100, total=100, limit=0.05)
    assert ingestion._too_many(rejected=6, tried=100, total=100, limit=0.05)
    assert not ingestion._too_many(rejected=8, tried=100, total=10_000, limit=0.05)
    assert ingestion._too_many(rejected=100, tried=1000, total=100_000, limit=0.05)
    assert ingestion._too_many(rejected=1, tried=1, total=100, limit=0.0)


def test_a_split_with_nothing_but_rejects_is_empty(make_pairs, tmp_path):
    config = make_pairs(max_reject_share=1.0)
    for part in plan.make_plan(config).parts:
        for item in part.items:
            if part.split == "test":
                Path(item.image).unlink()
    directory = ingest(config, tmp_path / "out")
    with pytest.raises(UserError, match=r"split test has no record, it has .'train'"):
        shards.open_split(directory, "test")
    assert len(shards.open_split(directory, "train"))


def test_a_source_without_a_usable_record_is_refused(make_pairs, tmp_path):
    with pytest.raises(UserError, match=r"pairs\.csv: no usable record"):
        ingest(make_pairs(count=0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_of_which_everything_is_left_out_is_refused(make_pairs, tmp_path):
    config = make_pairs(min_tokens=100)
    with pytest.raises(UserError, match=r"no usable record: 0 rejected, 24 left out, the first: "):
        ingest(config, tmp_path / "out")
    config.pairs.view, config.min_tokens = "subject", 3
    with pytest.raises(UserError, match=r"0 rejected; 24 left out \(not a frontal view\)"):
        ingest(config, tmp_path / "other")


def test_a_full_disk_is_told_and_loses_nothing(make_pairs, tmp_path):
    config = make_pairs(count=40, size=128, records_per_shard=10)
    whole = snapshot(ingest(config, tmp_path / "whole"))
    directory = tmp_path / "out"
    limit = min(len(data) for data in whole.values()) + 1000
    assert limit < max(len(data) for data in whole.values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        config.records_per_shard = 4  # the first shards are small enough
        small = ingest(config, tmp_path / "small")
        config.records_per_shard = 10
        with pytest.raises(UserError, match=r"disk full: .*out/.*: free some space"):
            ingest(config, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(shards.open_split(small, "train"))
    kept = times(directory)
    assert not list(directory.rglob("*.tmp"))
    ingest(config, directory)
    assert snapshot(directory) == whole
    assert kept.items() <= times(directory).items()


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_damaged_shard_is_named_and_mended_alone(make_pairs, tmp_path, damage):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    whole, before = snapshot(directory), times(directory)
    victim = directory / sorted(whole)[2]
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(whole[victim.name][:1000])
    with pytest.raises(UserError, match=f"{victim.name}: .*{damage}"):
        shards.open_split(directory, "train")
    ingest(config, directory)
    assert snapshot(directory) == whole
    after = times(directory)
    assert {name for name in after if after[name] != before[name]} == {victim.name}


def test_a_shard_damaged_inside_is_mended_alone_once_deleted(make_pairs, tmp_path):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    whole, before = snapshot(directory), times(directory)
    info = (directory / "medsyn.json").read_bytes()
    victim = directory / sorted(n for n in whole if "train" in n)[1]
    damaged = bytearray(whole[victim.name])
    middle = len(damaged) // 2
    damaged[middle : middle + 64] = bytes(64)
    victim.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{victim.name} is damaged .*delete it and ingest again"):
        shards.open_split(directory, "train").texts(("findings",))
    victim.unlink()
    ingest(config, directory)
    assert snapshot(directory) == whole
    assert len(shards.open_split(directory, "train").texts(("findings",))) > 5
    after = times(directory)
    assert {name for name in after if after[name] != before[name]} == {victim.name}
    assert (directory / "medsyn.json").read_bytes() == info


def test_a_second_writer_waits_for_the_first(make_pairs, tmp_path, monkeypatch):
    config, directory = make_pairs(), tmp_path / "out"
    directory.mkdir()
    waiting, said = threading.Event(), []

    def say(line):
        said.append(line)
        waiting.set()

    monkeypatch.setattr(build, "say", say)
    second = threading.Thread(target=ingest, args=(config, directory))
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        assert waiting.wait(60)
        assert "waiting for another process" in said[0]
        assert os.listdir(directory) == [".lock"]
    second.join(60)
    assert len(all_keys(directory)) == 24


def test_a_bug_keeps_its_traceback(make_pairs, tmp_path, monkeypatch):
    def broken(item, config):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(pairs, "make", broken)
    with pytest.raises(ZeroDivisionError):
        ingest(make_pairs(), tmp_path / "out")
