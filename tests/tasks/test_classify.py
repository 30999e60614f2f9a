"""The classify task from a workdir to results.json, and its figures against sklearn."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from configs.classify import get_config
from medsyn_jax import main
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.store import splits
from medsyn_jax.models.weights import convert
from medsyn_jax.tasks import classify
from medsyn_jax.train import features, fractions, frozen, probe
from tests.train.runs import ingest_config, write_pairs, write_run

NAMES = ("a", "b", "c")
FIGURES = ("auroc", "auprc", "accuracy", "f1", "ece")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a pre-training run in `run` and pairs in `pairs`."""
    folder = tmp_path_factory.mktemp("world")
    write_run(folder / "run")
    write_pairs(folder / "pairs", count=200)
    return folder


def config_of(world: Path):
    config = get_config("smoke")
    config.encoder.workdir = str(world / "run")
    config.data.source = str(world / "pairs" / "pairs.csv")
    config.ingest = ingest_config()
    config.ingest.update({"folder": {"subject": ""}})
    config.labels.names = ("bright", "left", "rare")
    config.labels.uncertain_ones = ("bright",)
    config.probe.update({"epochs": 20, "learning_rate": 0.02})
    return config


def protocols_of(encoder: str) -> list[str]:
    return [f"{encoder}/{protocol}" for protocol in ("linear-convex", "linear-adamw")]


def task_of(kind: str, names: tuple[str, ...] = NAMES) -> probe.Task:
    policy = np.array([1, 0, -2][: len(names)], np.int8)
    return probe.Task(kind, names, np.arange(len(names)), policy, np.full_like(policy, -2))


def test_a_run_from_workdir_to_results(world, tmp_path, monkeypatch):
    config, workdir = config_of(world), tmp_path / "probe"
    other = frozen.untrained(world / "run", 5)
    config.encoder.weights = str(tmp_path / "image.safetensors")
    convert.save(
        config.encoder.weights, "torchvision", *jax.device_get((other.params, other.stats))
    )
    main.run(config, workdir)
    text = (workdir / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert results["task"] == "classify"
    metrics = results["metrics"]
    for encoder in ("pretrained", "random", "imagenet", "pixels"):
        for path in (f"{e}/test/{f}" for e in protocols_of(encoder) for f in ("50%", "100%")):
            for label in ("bright", "left", "mean"):
                for figure in FIGURES:
                    entry = metrics[f"{path}/{figure}/{label}"]
                    assert entry["ci95"][0] <= entry["ci95"][1]
                    assert len(entry["seeds"]) == 3
                    assert 0 <= entry["value"] <= 1
                entry = metrics[f"{path}/auroc/{label}"]
                assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
            # brightness can be read off any encoder, so the whole chain learns or is broken
            assert metrics[f"{path}/auroc/bright"]["value"] > 0.9
            assert metrics[f"{path}/f1/bright"]["value"] > 0.7
            assert f"{path}/auroc/rare" not in metrics
    assert metrics["random/linear-adamw/test/100%/auroc/left"]["n"] < 40  # some are not mentioned
    # The same records give the same fit; seeds of `random` are of three encoders.
    for encoder, count in (("pretrained", 1), ("random", 3)):
        entry = metrics[f"{encoder}/linear-convex/test/100%/ece/left"]
        assert len(set(entry["seeds"])) == count
    for other in ("random", "imagenet", "pixels"):
        for protocol in ("linear-convex", "linear-adamw"):
            end = f"{protocol}/test/50%/auroc/mean"
            pair = [metrics[f"{e}/{end}"]["value"] for e in ("pretrained", other)]
            gain = metrics[f"pretrained-{other}/{end}"]
            assert gain["value"] == pytest.approx(pair[0] - pair[1], abs=1e-9)
            assert gain["ci95"][0] <= gain["value"] <= gain["ci95"][1]
    _check_fractions(workdir / "fractions")
    _check_examples(workdir / "examples", metrics)

    monkeypatch.setattr(features, "compute", lambda *_: pytest.fail("features are on disk"))
    main.run(config, workdir)
    assert (workdir / "results.json").read_text() == text


def _check_examples(folder: Path, metrics: dict) -> None:
    """Pictures of each encoder but pixels, and ROC curves with the area of the first seed."""
    encoders, fractions = ("pretrained", "random", "imagenet", "pixels"), ("50%", "100%")
    strips = {f"{encoder}-{fraction}.png" for encoder in encoders[:3] for fraction in fractions}
    assert {path.name for path in folder.iterdir()} == strips | {"roc.json"}
    curves = json.loads((folder / "roc.json").read_text())
    assert [*curves] == [*encoders]
    for encoder in encoders:
        for fraction in fractions:
            roc = curves[encoder][fraction]
            for label in ("bright", "left", "mean"):
                rates = roc["true_positive_rates"][label]
                area = np.trapezoid(rates, roc["false_positive_rates"])
                entry = metrics[f"{encoder}/linear-convex/test/{fraction}/auroc/{label}"]
                assert area == pytest.approx(entry["seeds"][0], abs=0.02)


def _check_fractions(folder: Path) -> None:
    keys = {}
    for share in ("50%", "100%"):
        for seed in range(3):
            path = folder / f"{share}-seed{seed}.txt"
            digest, name = path.with_suffix(".sha256").read_text().split()
            assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
            assert name == path.name
            keys[share, seed] = set(path.read_text().split())
    assert len(keys["100%", 0]) == 120
    assert all(len(keys["50%", seed]) == 60 for seed in range(3))
    assert len({frozenset(keys["50%", seed]) for seed in range(3)}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.workdir": "nowhere"}, "configs/convirt.py` first"),
        ({"data.source": ""}, "config.data.source: is empty"),
        ({"data.source": "gone.csv"}, r"config.data.source 'gone.csv' \(looked at /"),
        ({"encoder.weights": "gone.safetensors"}, "config.encoder.weights 'gone.safetensors'"),
        ({"labels.names": ("bright", "fog")}, "config.labels.names: fog: not among"),
        ({"labels.uncertain_zeros": ("fog",)}, "config.labels.uncertain_zeros: fog"),
        ({"labels.kind": "many"}, "config.labels.kind: 'many'"),
        ({"labels.names": ("bright",), "labels.kind": "multiclass"}, "too few labels"),
        ({"labels.names": ("rare",)}, "no label of rare has both"),
        ({"fractions": (0.0,)}, r"config.fractions: \(0.0,\): give shares above 0"),
        ({"fractions": ()}, r"config.fractions: \(\): give shares above 0"),
        ({"fractions": ("1%",)}, r"config.fractions: \('1%',\): give shares above 0"),
        ({"labels.names": (1,)}, r"config.labels.names: \(1,\): give texts"),
        ({"encoder.std": 0.0}, r"config.encoder.std: 0.0: give a share above 0"),
        (
            {"probe.weight_decay": float("inf")},
            r"config.probe.weight_decay: inf: give a finite",
        ),
        ({"seed": -1}, r"config.seed: -1: give a number of 0 or more"),
        ({"fractions_from": "gone"}, r"config.fractions_from 'gone' \(looked at /"),
        ({"data.batch_size": 0}, "config.data.batch_size: 0: give a number above 0"),
        ({"data.threads": -1}, "config.data.threads: -1: give a number of 0 or more"),
        ({"probe.epochs": 0}, "config.probe.epochs: 0: give a number above 0"),
        ({"seeds": 0}, "config.seeds: 0: give a number above 0"),
        ({"untrained": -1}, "config.untrained: -1: give a number of 0 or more"),
        ({"protocols": ()}, r"config.protocols: \(\): name at least one of linear-convex"),
        ({"protocols": ("svm",)}, "config.protocols: 'svm' is unknown: choose from linear-convex"),
        (
            {"finetune.learning_rate": 0.0},
            "config.finetune.learning_rate: 0.0: give a number above",
        ),
        ({"finetune.batch_size": 0}, "config.finetune.batch_size: 0: give a whole number above"),
        ({"finetune.patience": 0}, "config.finetune.patience: 0: give a whole number above 0"),
        (
            {"finetune.augment.area": (0.0, 1.0)},
            r"config.finetune.augment.area: \(0.0, 1.0\): give",
        ),
        (
            {"finetune.augment.blur": (2.0, 1.0)},
            r"config.finetune.augment.blur: \(2.0, 1.0\): give",
        ),
        (
            {"finetune.learning_rate": 1e30, "protocols": ("finetuned",)},
            "config.finetune.learning_rate: the fit of pretrained, finetuned, 50% .* diverged",
        ),
        ({"inverse_penalties": (0.0,)}, r"config.inverse_penalties: \(0.0,\): give numbers above"),
        ({"encoders": ("nowhere",)}, "nowhere: .*`python -m medsyn_jax.main"),
        ({"probe.learning_rate": 1e30}, "config.probe.learning_rate: 1e\\+30: .* diverged"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(world, tmp_path, changes, message):
    config = config_of(world)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        main.run(config, tmp_path / "probe")
    assert "\n" not in str(error.value)


def test_encoders_are_compared_in_one_run(world, tmp_path, capsys):
    """A run, and the same under another name: their difference is nothing but zero."""
    copied = tmp_path / "again"
    shutil.copytree(world / "run", copied)
    config = config_of(world)
    config.encoders = (str(world / "run"), str(copied))
    config.protocols, config.fractions = ("linear-convex",), (0.5,)
    config.untrained = 0
    main.run(config, tmp_path / "none")
    metrics = json.loads((tmp_path / "none" / "results.json").read_text())["metrics"]
    assert not any("random" in name for name in metrics)
    capsys.readouterr()
    config.untrained = 3
    main.run(config, tmp_path / "probe")
    metrics = json.loads((tmp_path / "probe" / "results.json").read_text())["metrics"]
    assert {name.split("/")[0] for name in metrics} == {
        "run", "again", "random", "pixels", "run-again",
        "run-random", "again-random", "run-pixels", "again-pixels",
    }  # fmt: skip
    end = "linear-convex/test/50%/auroc/mean"
    assert metrics[f"run-again/{end}"]["ci95"] == [0, 0]
    assert metrics[f"run-pixels/{end}"] == metrics[f"again-pixels/{end}"]
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("run-again/linear-convex"))
    assert row.split() == ["run-again/linear-convex", "+0.000", "[+0.000,", "+0.000]"]


def test_runs_of_one_name_are_told_apart_by_their_paths():
    config = get_config("smoke")
    config.encoders = ("a/run", "b/run", "c/random", "d/other", "d/other")
    names = classify._run_folders(config)
    assert list(names) == ["a-run", "b-run", "c-random", "other"]
    assert names["b-run"] == Path("b/run")


def test_fractions_come_from_the_files_that_are_there(tmp_path):
    config, keys = get_config("smoke"), [f"k{i}" for i in range(10)]

    def drawn(run, known=keys):
        return fractions.label_subsets(config, tmp_path / run, 0.5, known, None)

    own = drawn("own")
    np.testing.assert_array_equal(drawn("own"), own)
    folder = tmp_path / "own" / "fractions"
    first = folder / "50%-seed0.txt"
    splits.write_fraction(first, ["k9", "k1", "k4"])  # somebody's own choice, with its hash
    edited = drawn("own")
    assert edited[0].tolist() == [9, 1, 4, -1, -1]
    np.testing.assert_array_equal(edited[1:], own[1:])
    with pytest.raises(UserError, match=r"50%-seed0.txt: 1 of its 3 keys, such as k9, are not in"):
        drawn("own", keys[:9])

    config.fractions_from = str(folder)
    np.testing.assert_array_equal(drawn("other"), edited)
    assert not (tmp_path / "other").exists()
    first.write_text("k9\nk1\n")
    with pytest.raises(UserError, match=r"50%-seed0.txt: was changed after it was written"):
        drawn("other")
    for keys_of, what in (([], "holds no key"), (["k1", "k1"], "or one twice")):
        splits.write_fraction(first, keys_of)
        with pytest.raises(UserError, match=rf"50%-seed0.txt: .*{what}"):
            drawn("other")
    first.unlink()
    with pytest.raises(UserError, match=r"50%-seed0.txt: cannot be read"):
        drawn("other")
    first.with_suffix(".sha256").unlink()
    with pytest.raises(UserError, match=r"50%-seed0.sha256: cannot be read .*`sha256sum"):
        drawn("other")


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_a_test_split_without_any_figure_is_refused_before_a_fit(kind):
    """Both classes in train and valid, but in test the second is uncertain, so it is left out."""
    task = task_of(kind, NAMES[:2])
    both, one = (np.array([[1, 0], other] * 4, np.int8) for other in ([0, 1], [-1, -1]))
    targets = {split: task.targets(both) for split in ("train", "valid")}
    targets["test"] = task.targets(one, test=True)
    with pytest.raises(UserError, match=r"no label of a, b has both .* in the test split"):
        classify.check_labels(task, targets)


def fractions_of(kind, targets, folder, shares=(0.5, 1.0)):
    """Of 8 training records k0 ... k7, the half of seed 0 being k0 to k3, of seed 1 k4 to k7."""
    config, keys = get_config("smoke"), [f"k{i}" for i in range(8)]
    config.fractions, config.seeds, config.fractions_from = shares, 2, str(folder)
    for seed in range(2):
        for share in (50, 100):
            rows = range(8) if share == 100 else range(4 * seed, 4 * seed + 4)
            path = folder / f"{share}%-seed{seed}.txt"
            splits.write_fraction(path, [keys[i] for i in rows])
    task = task_of(kind)
    return fractions.draw(config, folder, task, targets, keys, keys)


def test_a_label_that_a_seed_cannot_learn_is_left_out_of_a_fraction(tmp_path, capsys):
    """Its AUROC would be that of a random start, or of another set of labels for each seed."""
    train = np.zeros((8, 3), np.int8)
    train[::2, 0] = 1  # for both seeds; the second label for seed 0 alone, the third for none
    train[1, 1], train[:, 2] = 1, -2
    both = np.array([[0, 0, 0], [1, 1, 1]], np.int8)
    targets = {"train": train, "valid": both, "test": both}
    half, whole = fractions_of("multilabel", targets, tmp_path)
    assert (half.name, half.trained.tolist()) == ("50%", [True, False, False])
    assert (whole.name, whole.trained.tolist()) == ("100%", [True, True, False])
    said = capsys.readouterr()
    err = said.err
    assert [line.split() for line in said.out.splitlines()[1:]] == [
        ["a", "2", "/", "2", "4", "/", "4"],
        ["b", "0-1", "/", "3-4", "1", "/", "7"],
        ["c", "0", "/", "0", "0", "/", "0"],
    ]
    assert (
        "50% of the labels: left out, not taught by its records: b (no positive for seed 1), c (no"
        in err
    )
    assert "100% of the labels: left out, not taught by its records: c (no positive, no neg" in err

    targets["valid"] = both * np.array([0, 1, 1], np.int8)  # what is left has one class there
    assert [f.name for f in fractions_of("multilabel", targets, tmp_path)] == ["100%"]
    assert "50% of the labels: no figure at all: none" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"config.fractions: \(0.5,\): at none of them .* of a, b, c"
    ):
        fractions_of("multilabel", targets, tmp_path, (0.5,))


def test_a_class_that_a_seed_cannot_learn_is_left_out_of_a_fraction(tmp_path, capsys):
    train = np.array([0, 1, 2, 0, 0, 1, 1, 0], np.int32)
    targets = {"train": train, "valid": np.arange(3), "test": np.arange(3)}
    half, whole = fractions_of("multiclass", targets, tmp_path)
    assert (half.trained.tolist(), whole.trained.tolist()) == ([True, True, False], [True] * 3)
    assert (
        "50% of the labels: left out, not taught by its records: c (no" in capsys.readouterr().err
    )
    test = np.array([0, 1, 2, 1], np.int32)
    outputs = np.array([[[1, 0, 9], [0, 1, 9], [0, 0, 9], [1, 0, 9]]], np.float32)
    figure = probe.judge(task_of("multiclass"), outputs, test, np.arange(4), half.trained)
    assert (figure["accuracy"].n, figure["accuracy"].values.tolist()) == (3, [2 / 3])


def test_labels_without_both_classes_in_valid_or_test_are_named_once(capsys):
    y = np.array([[0, 0, 0], [1, 1, 1]], np.int8)
    targets = {"train": y, "valid": y * np.array([1, 0, 1], np.int8)}
    targets["test"] = y * np.array([1, 1, 0], np.int8)
    classify.check_labels(task_of("multilabel"), targets)
    assert capsys.readouterr().err.splitlines() == [
        "one class only of b in the valid split; early stopping cannot see that",
        "no AUROC of c: one class only in the test split",
    ]


def test_what_is_not_taught_has_no_say_in_the_mean_nor_in_when_to_stop(world, tmp_path, capsys):
    """`late` is labelled in valid and test alone: the figures are those of a run without it."""
    path = world / "pairs" / "pairs.csv"
    head, *rows = path.read_text().splitlines()
    late = [f"{row},{'' if ',train,' in row else i % 2}" for i, row in enumerate(rows)]
    (world / "pairs" / "late.csv").write_text("\n".join([f"{head},late", *late]) + "\n")
    config = config_of(world)
    config.data.source = str(world / "pairs" / "late.csv")
    config.ingest.pairs.labels = ("bright", "left", "rare", "late")
    found = []
    for names in (("bright", "left", "late"), ("bright", "left")):
        config.labels.names = names
        main.run(config, tmp_path / "-".join(names))
        found.append(json.loads((tmp_path / "-".join(names) / "results.json").read_text()))
    with_late, without = (x["metrics"] for x in found)
    assert not [name for name in with_late if "late" in name]
    names = [f"{e}/test/100%/auroc" for e in protocols_of("pretrained") + protocols_of("random")]
    for name in names:
        entry = with_late[f"{name}/mean"]
        assert entry["labels"] == 2
        both = [with_late[f"{name}/{label}"]["value"] for label in ("bright", "left")]
        assert entry["value"] == pytest.approx(np.mean(both))
        # Equal but for the start of the layer, which is drawn for three outputs or for two.
        assert entry["n"] == without[f"{name}/mean"]["n"]
    said = capsys.readouterr()
    assert said.err.count("100% of the labels: left out, not taught by its records: late (no") == 1
    rows = [line.split() for line in said.out.splitlines()]
    table = {row[0]: row for row in rows if row[3:4] == ["random/linear-convex"]}
    assert (table["late"][1], table["late"][4:]) == ("40", ["-", "-"])
    left = with_late["random/linear-convex/test/100%/auroc/left"]
    assert table["left"][1:3] == [str(left["n"]), str(left["positives"])]
    # A label that is left out does not change the convex fit of the others.
    for name in (name for name in names if "convex" in name):
        assert with_late[f"{name}/left"]["value"] == pytest.approx(without[f"{name}/left"]["value"])


def test_uncertain_is_never_an_answer_of_the_test_split():
    task = task_of("multilabel")
    labels = np.array([[-1, -1, -1], [1, 0, -2]], np.int8)
    assert task.targets(labels).tolist() == [[1, 0, -2], [1, 0, -2]]
    assert task.targets(labels, test=True).tolist() == [[-2, -2, -2], [1, 0, -2]]


def test_classes_are_the_one_positive_label():
    labels = np.array([[0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, -2, -2]], np.int8)
    assert task_of("multiclass").targets(labels).tolist() == [1, 2, -2, -2, 0]


def test_columns_follow_the_chosen_names():
    config = get_config("paper")
    available = [*reversed(config.labels.names), "Fracture"]
    task = classify.make_task(config.labels, available)
    assert [available[i] for i in task.columns] == list(task.names) == list(config.labels.names)
    got = task.targets(np.array([[-1] * 6, [-2] * 6], np.int8))
    assert dict(zip(task.names, got[0].tolist(), strict=True)) == {
        "Atelectasis": 1,
        "Cardiomegaly": 0,
        "Consolidation": 0,
        "Edema": 1,
        "Pleural Effusion": 1,
    }
    assert got[1].tolist() == [0] * 5


def test_figures_of_labels_are_sklearns():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(2, 60, 3)).astype(np.float32)
    test = rng.choice([1, 0, -2], size=(60, 3)).astype(np.int8)
    test[:, 2] = np.minimum(test[:, 2], 0)  # no positive
    figures = probe.judge(task_of("multilabel"), outputs, test, np.arange(60) // 2)
    assert list(figures) == ["auroc/a", "auroc/b", "auroc/mean"]
    for i, name in enumerate("ab"):
        known = test[:, i] >= 0
        want = [roc_auc_score(test[known, i], x[known, i]) for x in outputs]
        figure = figures[f"auroc/{name}"]
        assert figure.values == pytest.approx(want, abs=1e-9)
        assert figure.n == known.sum()
        assert figure.draws.shape == (1000, 2)
        assert np.abs(figure.draws.mean(0) - want).max() < 0.03
    both = [figures["auroc/a"].values, figures["auroc/b"].values]
    assert figures["auroc/mean"].values == pytest.approx(np.mean(both, axis=0))
    assert figures["auroc/mean"].n == 60


def test_figures_at_the_threshold_of_validation_are_sklearns():
    rng = np.random.default_rng(2)
    outputs, valid_outputs = rng.normal(size=(2, 2, 300, 2)).astype(np.float32)
    test, valid = rng.choice([1, 0, -2], size=(2, 300, 2), p=[0.2, 0.7, 0.1]).astype(np.int8)
    outputs, valid_outputs = outputs + np.maximum(test, 0), valid_outputs + np.maximum(valid, 0)
    subjects, task = np.arange(300), task_of("multilabel", NAMES[:2])
    figures = probe.judge(task, outputs, test, subjects, valid=(valid_outputs, valid))
    for s in range(2):
        known, seen = test[:, 1] >= 0, valid[:, 1] >= 0
        y, x = test[known, 1], outputs[s, known, 1]
        v, u = valid[seen, 1], valid_outputs[s, seen, 1]
        best = max(np.unique(u), key=lambda t: f1_score(v, u >= t))
        want = {
            "auroc": roc_auc_score(y, x),
            "auprc": average_precision_score(y, x),
            "f1": f1_score(y, x >= best),
            "accuracy": (y == (x >= best)).mean(),
        }
        for figure, value in want.items():
            assert figures[f"{figure}/b"].values[s] == pytest.approx(value, abs=1e-9), figure
        p = 1 / (1 + np.exp(-x.astype(np.float64)))
        bins = [(p >= i / 15) & (p < (i + 1) / 15) for i in range(15)]
        error = sum(b.mean() * abs(y[b].mean() - p[b].mean()) for b in bins if b.any())
        assert figures["ece/b"].values[s] == pytest.approx(error, abs=1e-6)
    assert figures["auprc/mean"].counts == {"labels": 2}


@pytest.mark.parametrize("count", [2, 3])
def test_figures_of_classes(count):
    rng = np.random.default_rng(1)
    classes = rng.integers(0, count, 80).astype(np.int32)
    outputs = rng.normal(size=(1, 80, count)).astype(np.float32) + 2 * np.eye(count)[classes]
    classes[:10] = -2
    known = classes >= 0
    figures = probe.judge(task_of("multiclass", NAMES[:count]), outputs, classes, np.arange(80))
    right = outputs[0, known].argmax(1) == classes[known]
    assert figures["accuracy"].values == pytest.approx(right.mean())
    assert figures["accuracy"].n == 70
    if count == 2:
        scores = outputs[0, known, 1] - outputs[0, known, 0]
        want = roc_auc_score(classes[known], scores)
        assert figures["auroc/b"].values == pytest.approx(want, abs=1e-9)
    else:
        odds = np.exp(outputs[0, known]) / np.exp(outputs[0, known]).sum(axis=1, keepdims=True)
        want = roc_auc_score(classes[known], odds, multi_class="ovr")
        assert figures["auroc/mean"].values == pytest.approx(want, abs=1e-6)
