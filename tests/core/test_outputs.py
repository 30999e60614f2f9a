import errno
import json

import pytest
from ml_collections import ConfigDict

from medsyn_jax.core import outputs
from medsyn_jax.core.errors import UserError


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    first = outputs.MetricsLog(tmp_path, 0, 10, 4)
    for step in range(1, 6):
        first.write(step, {"train/loss": 1.0 / step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # a kill in the middle of a line
    again = outputs.MetricsLog(tmp_path, 3, 10, 4)
    again.write(4, {"train/loss": 0.25})
    again.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_progress_gives_a_rate_without_the_pauses(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(outputs.time, "monotonic", lambda: now[0])
    metrics = outputs.MetricsLog(tmp_path, 0, 10, records=8, every_s=5.0)
    now[0] += 1.0
    assert metrics.progress(1, 0.5) is None
    with metrics.paused():
        now[0] += 60.0
    now[0] += 4.0
    assert metrics.progress(5, 0.5) == pytest.approx(5 * 8 / 5.0)
    metrics.close()


def test_another_config_in_the_same_workdir_is_refused_but_not_another_mesh(tmp_path):
    config = ConfigDict({"data": {"batch_size": 8}, "mesh": {"data": 8}})
    outputs.check_config(tmp_path, config)
    outputs.write_config(tmp_path, config)
    config.mesh.data = 1
    outputs.check_config(tmp_path, config, free=("mesh.",))
    with pytest.raises(UserError, match=r"mesh\.data 8 -> 1"):
        outputs.check_config(tmp_path, config)
    config.data.batch_size = 16
    with pytest.raises(UserError, match=r"data\.batch_size 8 -> 16"):
        outputs.check_config(tmp_path, config, free=("mesh.",))


def test_a_field_of_another_version_takes_its_default(tmp_path, capsys):
    outputs.write_config(tmp_path, ConfigDict({"optim": {"lr": 0.1, "old": 1}, "loss": {}}))
    config = ConfigDict({"optim": {"lr": 0.1, "new": 2}, "loss": {"tau": 3}, "more": {}})
    outputs.check_config(tmp_path, config)
    said = capsys.readouterr().err
    assert "version of medsyn_jax: optim.old has no effect any more" in said
    assert "version of medsyn_jax: loss.tau=3, optim.new=2 is new and takes its default" in said
    outputs.check_config(tmp_path, config, overrides={"optim.lr"})
    with pytest.raises(UserError, match=r"another config \(optim\.new None -> 2\)"):
        outputs.check_config(tmp_path, config, overrides={"optim.new"})
    config.optim.lr = 0.2
    with pytest.raises(UserError, match=r"another config \(optim\.lr 0\.1 -> 0\.2\)"):
        outputs.check_config(tmp_path, config)


def test_a_foreign_config_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a config written by medsyn_jax"):
        outputs.check_config(tmp_path, ConfigDict({"a": 1}))


@pytest.mark.parametrize("text", ["[]", '{"config": []}', '{"config": 3}', "\xff", "[" * 99999])
def test_a_config_json_that_is_no_object_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError):
        outputs.check_config(tmp_path, ConfigDict({"a": 1}))


def test_what_is_undefined_is_printed_so_and_null_in_json(tmp_path, capsys):
    entry = {"value": None, "n": 3, "ci95": [float("nan"), 1.0], "chance": float("inf")}
    metrics = {"a": entry, "bb": {"value": float("nan"), "ci95": None, "prior": None}}
    outputs.write_results(tmp_path, "any", metrics)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "a   undefined  [undefined, 1]  n=3  chance undefined",
        "bb  undefined  prior undefined",
    ]
    text = (tmp_path / "results.json").read_text()
    written = json.loads(text, parse_constant=pytest.fail)["metrics"]
    assert written["a"] == {"value": None, "n": 3, "ci95": [None, 1.0], "chance": None}
    assert written["bb"] == {"value": None, "ci95": None, "prior": None}


def test_a_metric_that_is_not_finite_is_null_in_the_log(tmp_path):
    metrics = outputs.MetricsLog(tmp_path, 0, 10, 4)
    metrics.write(1, {"valid/loss": float("nan"), "valid/recall": 0.5})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    want = {"step": 1, "valid/loss": None, "valid/recall": 0.5}
    assert json.loads(line, parse_constant=pytest.fail) == want


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    outputs.write_json(path, {"value": 1})

    def full(self, text, encoding):
        self.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs.Path, "write_text", full)
    with pytest.raises(UserError, match=r"disk full: .*results.json"):
        outputs.write_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_results_are_printed_and_written(tmp_path, capsys):
    outputs.write_results(
        tmp_path, "pretrain", {"test/recall": {"value": 0.5, "n": 4, "ci95": [0.25, 0.75]}}
    )
    assert "[0.25, 0.75]  n=4" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == {
        "task": "pretrain",
        "metrics": {"test/recall": {"value": 0.5, "n": 4, "ci95": [0.25, 0.75]}},
    }
