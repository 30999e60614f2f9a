import errno
import json
import re

import pytest
from ml_collections import ConfigDict

from medsyn_jax.core import log
from medsyn_jax.core.errors import UserError


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_go_on_where_the_checkpoint_was(tmp_path):
    first = log.MetricsLog(tmp_path, 0, 10, 4)
    for step in range(1, 6):
        first.write(step, {"train/loss": 1.0 / step})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # a kill in the middle of a line
    again = log.MetricsLog(tmp_path, 3, 10, 4)
    again.write(4, {"train/loss": 0.25})
    again.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_progress_gives_a_rate_without_the_pauses(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    metrics = log.MetricsLog(tmp_path, 0, 10, records=8, every_s=5.0)
    now[0] += 1.0
    assert metrics.progress(1, 0.5) is None
    metrics.pause()
    now[0] += 60.0
    metrics.resume()
    now[0] += 4.0
    assert metrics.progress(5, 0.5) == pytest.approx(5 * 8 / 5.0)
    metrics.close()


def test_another_config_in_the_same_workdir_is_refused_but_not_another_mesh(tmp_path):
    config = ConfigDict({"data": {"batch_size": 8}, "mesh": {"data": 8}})
    log.write_config(tmp_path, config, free=("mesh.",))
    config.mesh.data = 1
    log.write_config(tmp_path, config, free=("mesh.",))
    assert json.loads((tmp_path / "config.json").read_text())["config"]["mesh"]["data"] == 1
    config.data.batch_size = 16
    with pytest.raises(UserError, match=r"data\.batch_size 8 -> 16"):
        log.write_config(tmp_path, config, free=("mesh.",))
    assert json.loads((tmp_path / "config.json").read_text())["config"]["data"]["batch_size"] == 8


def test_a_foreign_config_json_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a config written by medsyn_jax"):
        log.write_config(tmp_path, ConfigDict({"a": 1}))
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    log.write_json(path, {"value": 1})

    def full(self, text):
        self.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log.Path, "write_text", full)
    with pytest.raises(UserError, match=r"disk full: .*results.json"):
        log.write_json(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_results_are_printed_and_written(tmp_path, capsys):
    log.write_results(
        tmp_path, "pretrain", {"test/recall": {"value": 0.5, "n": 4, "ci95": [0.25, 0.75]}}
    )
    assert "[0.25, 0.75]  n=4" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == {
        "task": "pretrain",
        "metrics": {"test/recall": {"value": 0.5, "n": 4, "ci95": [0.25, 0.75]}},
    }


def test_the_cost_is_that_of_this_process(capsys):
    log.say_cost("done")
    said = capsys.readouterr().err
    assert re.fullmatch(r"done after [\d.]+ s; peak host memory \d+ MiB \(this process\)\n", said)
