"""The study's plan of commands, what it does with those that fail, and that it runs none twice."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.study import get_config
from medsyn_jax import main
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import resolve
from medsyn_jax.tables import cells as tables
from medsyn_jax.tables import examples
from medsyn_jax.tables.cells import Cell
from medsyn_jax.tasks import study
from tests.train.runs import ingest_config


def plan(variant="demo", workdir=Path("w"), **changes):
    config = get_config(variant)
    config.update(changes)
    commands = study.Commands(config, workdir)
    return config, study.plan(config, commands), commands.by_name


def flags_of(command) -> dict[str, str]:
    return dict(flag.removeprefix("--config.").split("=", 1) for flag in command.flags)


def test_the_plan_has_every_cell_once_and_commands_after_what_they_need():
    config, cells, commands = plan()
    arms = 1 + sum(map(len, config.arms.values()))  # one starts at random
    assert len({cell.name for cell in cells}) == len(cells) == arms * 3 * 3 * 3
    order = [*commands]
    for command in commands.values():
        assert all(order.index(need) < order.index(command.name) for need in command.needs)
    assert {*cells.values()} <= {*commands}


def test_every_arm_trains_for_the_same_number_of_steps_on_its_data():
    config, _, commands = plan()
    real, synthetic = "w/runs/real/shards", "w/runs/synthetic/shards"
    for arm, sources in (
        ("real", (real,)),
        ("synthetic", (synthetic,)),
        ("mixed", (real, synthetic)),
        ("duplicated", (real, real)),
    ):
        flags = flags_of(commands[f"convirt_{arm}_seed1"])
        assert flags["data.sources"] == repr(sources)
        assert (flags["train.steps"], flags["seed"]) == (str(config.steps), "1")
        assert flags["train.patience"] == "0"
    halves = [
        flags_of(commands[f"convirt_{name}_seed1"])
        for name in ("synthetic_half", "synthetic_then_real")
    ]
    assert sum(int(flags["train.steps"]) for flags in halves) == config.steps
    assert [flags["data.sources"] for flags in halves] == [repr((synthetic,)), repr((real,))]
    assert halves[1]["image.weights"] == (
        "w/runs/convirt_synthetic_half_seed1/encoders/image.safetensors"
    )


def test_all_arms_of_a_seed_learn_from_the_same_labels():
    _, cells, commands = plan()
    for cell, name in cells.items():
        flags = flags_of(commands[name])
        assert (flags["seed"], flags["seeds"]) == (str(cell.seed), "1")
        assert flags["data.source"] == "w/runs/real/shards"


def test_imagenet_is_an_arm_where_its_weights_are_given():
    _, cells, commands = plan(imagenet="resnet50.safetensors")
    cell = Cell("none", "imagenet", "classify", 0.01, 2)
    assert flags_of(commands[cells[cell]])["encoder.weights"] == "resnet50.safetensors"
    assert all(cell.arm != "imagenet" for cell in plan()[1])


@pytest.fixture
def fake(monkeypatch):
    """Commands that only write what the real ones would; the names of those that ran."""
    ran: list[str] = []

    def run(runner, command):
        ran.append(command.name)
        if command.name in fails:
            return "status 2, error: no"
        folder = runner.workdir / "runs" / command.name
        folder.mkdir(parents=True)
        metrics = {
            f"{encoder}/{way}test/{share}/{metric}": {
                "value": 0.5 + len(folder.name) / 1000,
                "n": 9,
            }
            for encoder in ("pretrained", "random")
            for share in ("50%", "100%")
            for way, metric in (
                ("linear-convex/", "auroc/mean"),
                ("", "dice/per_set/with_empty"),
                ("", "map"),
            )
        }
        for encoder in ("pretrained", "random"):
            for share in ("50%", "100%"):
                path, empty = examples.path(folder, encoder, share), np.zeros((1, 8, 8), bool)
                shade = np.full((1, 8, 8), len(ran), np.uint8)
                examples.draw_masks(path, shade, empty, empty)
        if folder.name.endswith("classify"):
            curve = {"100%": {"false_positive_rates": [0, 1], "true_positive_rates": {}}}
            curve["100%"]["true_positive_rates"] = {"mean": [len(folder.name) / 100, 1]}
            (folder / "examples" / "roc.json").write_text(json.dumps({"pretrained": curve}))
        (folder / "results.json").write_text(json.dumps({"metrics": metrics}))
        (folder / "config.json").write_text(json.dumps({"versions": {}, "commit": "abc"}))
        runner._done(command.name).parent.mkdir(exist_ok=True)
        runner._done(command.name).touch()
        return ""

    fails: set[str] = set()
    monkeypatch.setattr(study._Runner, "_run", run)
    return ran, fails


def settings(**changes):
    config = get_config("smoke")
    config.update({"workers": 1} | changes)
    return config


def table(workdir) -> bytes:
    return (workdir / "table.md").read_bytes() + (workdir / "table.csv").read_bytes()


def test_a_study_runs_each_command_once_and_resumes(tmp_path, fake, capsys):
    ran, _ = fake
    main.run(settings(), tmp_path / "whole")
    assert len(ran) == len({*ran}) == 2 + 4 + 4 * 3  # data, pre-trainings, tasks
    ran.clear()
    main.run(settings(), tmp_path / "whole")
    assert ran == []
    main.run(settings(cells="*_classify_*"), tmp_path / "parts")
    assert "12 of 36 cells are finished." in (tmp_path / "parts" / "table.md").read_text()
    main.run(settings(workers=2), tmp_path / "parts")
    assert len(ran) == len({*ran}) == 18
    assert table(tmp_path / "parts") == table(tmp_path / "whole")
    lines = (tmp_path / "parts" / "cells.txt").read_text().split()
    assert {path.stem for path in (tmp_path / "parts" / "cells").iterdir()} == {*lines}


def test_cells_of_the_first_seed_have_pictures_and_curves(tmp_path, fake):
    main.run(settings(), tmp_path)
    entries = tables.read(tmp_path / "cells", [*plan("smoke")[1]])
    for cell, entry in entries.items():
        assert (entry["picture"] is not None) == (cell.seed == 0)
        curve = (cell.task, cell.method, cell.fraction, cell.seed) == ("classify", "convirt", 1, 0)
        assert bool(entry.get("roc")) == curve
    cell = Cell("convirt", "synthetic", "segment", 1.0, 0)
    source = tmp_path / "runs" / "convirt_synthetic_seed0_segment" / "examples"
    assert entries[cell]["picture"].png == (source / "pretrained-100%.png").read_bytes()
    classify = entries[Cell("convirt", "real", "classify", 1.0, 0)]
    rate = len("convirt_real_seed0_classify") / 100
    assert classify["roc"]["true_positive_rates"] == {"mean": [rate, 1]}


def test_pairs_are_of_the_same_reports(tmp_path, fake):
    config = settings(cells="none_random_detect_*")
    for name, shade in (("real", 0), ("synthetic", 1)):
        source = tmp_path / name
        source.mkdir()
        rows = [("image", "report", "split")]
        for i in range(12):
            pixels = np.full((16, 16), 20 * i + 10 * shade, np.uint8)
            pixels[0, 0] = 255  # an image of one grey level would be refused
            Image.fromarray(pixels).save(source / f"{i}.png")
            split = "train" if i < 8 + shade else "valid" if i == 10 else "test"
            rows.append((f"{i}.png", "The lungs are clear.", split))
        with (source / "pairs.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        ingest = ingest_config()
        ingest.update({"size": 16})
        ingest.pairs.update({"subject": "", "labels": ()})
        config[name] = str(resolve.prepare(str(source / "pairs.csv"), ingest, tmp_path / name))
    main.run(config, tmp_path / "study")
    with Image.open(tmp_path / "study" / "cells" / "pairs.png") as image:
        strip = np.asarray(image.convert("L")).astype(int)
    assert strip.shape == (260, 6 * 132 - 4)
    above, below = strip[64, 64::132], strip[196, 64::132]
    assert len({*above}) == 6
    np.testing.assert_allclose(below - above, 10, atol=4)  # 64 grey levels
    assert above.max() <= 20 * 7


def test_without_cells_the_list_and_the_table_are_written(tmp_path, fake):
    ran, _ = fake
    main.run(settings(cells=""), tmp_path)
    assert len((tmp_path / "cells.txt").read_text().split()) == 36
    assert not (tmp_path / "table.md").exists()
    main.run(settings(cells="none_random_detect_*"), tmp_path)
    (tmp_path / "table.md").unlink()
    ran.clear()
    main.run(settings(cells=""), tmp_path)
    assert ran == []
    assert "4 of 36 cells are finished." in (tmp_path / "table.md").read_text()


def test_a_cell_is_written_when_its_command_has_ended(tmp_path, fake, monkeypatch):
    """Not when the whole study has: here a later command breaks the study off."""
    whole = study._Runner._run

    def run(runner, command):
        if command.name == "convirt_real_seed1":
            raise KeyError("broken off")
        return whole(runner, command)

    monkeypatch.setattr(study._Runner, "_run", run)
    with pytest.raises(KeyError):
        main.run(settings(cells="convirt_real_classify_*"), tmp_path)
    written = {path.stem for path in (tmp_path / "cells").glob("*.json")}
    assert written == {f"convirt_real_classify_{share}pct_seed0" for share in (50, 100)}
    monkeypatch.setattr(study._Runner, "_run", whole)
    main.run(settings(cells="convirt_real_classify_*"), tmp_path)
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4


def test_a_failed_command_stops_only_what_needs_it(tmp_path, fake):
    ran, fails = fake
    fails.add("convirt_synthetic_seed1")
    with pytest.raises(UserError, match=r"4 of 18 .*convirt_synthetic_seed1: status"):
        main.run(settings(), tmp_path)
    assert "30 of 36 cells are finished." in (tmp_path / "table.md").read_text()
    fails.clear()
    ran.clear()
    main.run(settings(), tmp_path)
    assert len(ran) == 4
    assert "cells are finished" not in (tmp_path / "table.md").read_text()


def test_a_command_that_the_study_runs_leaves_its_log(tmp_path):
    """A real one, in a process of its own: done once, or failed with the reason."""
    config = settings()
    config.flags.ingest = ("ingest.phantom.subjects=4",)
    command = study.Command("real", "ingest", ("--config.ingest.phantom.subjects=4",))
    wrong = study.Command("wrong", "ingest", ("--config.ingest.size=0",))
    runner = study._Runner(config, tmp_path, {"real": command, "wrong": wrong})
    assert [*runner.run({"real", "wrong"}, lambda name: None)] == ["wrong"]
    assert re.match(r"status 2, error: ingest: size", runner.failures["wrong"])
    assert (tmp_path / "runs" / "real" / "shards").is_dir()
    assert "configs/ingest.py:smoke" in (tmp_path / "logs" / "real.txt").read_text()
    log = (tmp_path / "logs" / "real.txt").read_bytes()
    assert study._Runner(config, tmp_path, {"real": command}).run({"real"}, lambda name: None) == {}
    assert (tmp_path / "logs" / "real.txt").read_bytes() == log


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "config.steps: 0: give a whole number above 0"),
        ({"fractions": (0.0,)}, "config.fractions"),
        ({"cells": "nothing*"}, "config.cells: 'nothing.*names no cell; there are none_random_"),
        ({"configs": "elsewhere"}, "elsewhere/ingest.py: no such file: start from the repository"),
        ({"imagenet": "no.safetensors"}, "missing: config.imagenet"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        main.run(settings(**changes), tmp_path)


def test_an_unknown_arm_is_one_line(tmp_path):
    config = settings()
    config.arms.convirt = ("real", "imaginary")
    with pytest.raises(UserError, match=r"config.arms.convirt: .imaginary. is unknown: choose"):
        main.run(config, tmp_path)
