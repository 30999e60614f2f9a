"""Fine-tuning by the classify task, from a workdir to results.json."""

import json
from pathlib import Path

import pytest

from medsyn_jax import main
from tests.tasks.test_classify import FIGURES, config_of
from tests.train.runs import write_pairs, write_run


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a pre-training run in `run` and pairs in `pairs`."""
    folder = tmp_path_factory.mktemp("world")
    write_run(folder / "run")
    write_pairs(folder / "pairs", count=200)
    return folder


def test_fine_tuning_stands_beside_the_linear_protocol(world, tmp_path, capsys):
    config, workdir = config_of(world), tmp_path / "both"
    config.protocols = ("linear-convex", "finetuned")
    config.seeds, config.fractions = 2, (1.0,)
    config.finetune.update({"epochs": 6, "learning_rate": 0.01})
    main.run(config, workdir)
    metrics = json.loads((workdir / "results.json").read_text())["metrics"]
    finetuned = {name.split("/")[0] for name in metrics if "/finetuned/test/100%/" in name}
    assert finetuned == {"pretrained", "random", "pretrained-random"}
    assert "pretrained-pixels/linear-convex/test/100%/auroc/mean" in metrics
    for encoder in ("pretrained", "random"):
        for figure in FIGURES:
            names = [f"{encoder}/{p}/test/100%/{figure}/left" for p in config.protocols]
            assert len({metrics[name]["n"] for name in names}) == 1  # the same test records
            assert len(metrics[names[1]]["seeds"]) == 2
        assert metrics[f"{encoder}/finetuned/test/100%/auroc/bright"]["value"] > 0.9
        assert f"{encoder}/finetuned/test/100%/auroc/rare" not in metrics
    pair = [metrics[f"{e}/finetuned/test/100%/auroc/mean"] for e in ("pretrained", "random")]
    gain = metrics["pretrained-random/finetuned/test/100%/auroc/mean"]
    assert gain["value"] == pytest.approx(pair[0]["value"] - pair[1]["value"], abs=1e-9)
    err = capsys.readouterr().err
    assert err.count("pixels, finetuned: left out, because pixels have no encoder to train") == 1
    assert err.count("finetuned, 100% of the labels, seed 1 (120 images): validation loss 0.") == 2


def test_classes_are_fine_tuned_without_features(world, tmp_path, capsys):
    """Of the two classes, "left" is the one that is judged; figures need no stored features."""
    config, workdir = config_of(world), tmp_path / "classes"
    config.protocols, config.labels.kind = ("finetuned",), "multiclass"
    config.labels.names, config.labels.uncertain_ones = ("bright", "left"), ()
    config.seeds, config.fractions, config.untrained = 1, (1.0,), 0
    config.finetune.update({"epochs": 10, "learning_rate": 0.01})
    main.run(config, workdir)
    metrics = json.loads((workdir / "results.json").read_text())["metrics"]
    names = {"accuracy", *(f"{f}/{x}" for f in FIGURES for x in ("left", "mean"))}
    assert set(metrics) == {f"pretrained/finetuned/test/100%/{name}" for name in names}
    # Half of the test records are not known to be without "bright": they are judged as "left".
    assert "seed 0 (120 images): validation loss 0.0" in capsys.readouterr().err
    assert metrics["pretrained/finetuned/test/100%/auroc/left"]["value"] > 0.6
    assert not (workdir / "features").exists()
