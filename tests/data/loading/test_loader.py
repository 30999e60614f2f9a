import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import decode
from medsyn_jax.data.loading import dataset as source_module
from medsyn_jax.data.loading import loader
from medsyn_jax.data.sources.ingestion import ingest
from medsyn_jax.data.store import schema
from medsyn_jax.data.text import tokenizers
from tests.data.conftest import write_set

SECTIONS = ("findings", "impression")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"The lungs of number {i} are clear. No finding {i}." for i in range(50)]
    return tokenizers.train_wordpiece(texts, 100, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_source(make_pairs, tmp_path, tokenizer):
    """make_source(count, name, **arguments of Source) -> a Source whose records are all train."""

    def make(count=23, name="table", labels=("odd",), **arguments):
        config = make_pairs(count, name=name, split_shares=(1.0, 0.0, 0.0))
        config.pairs.labels = labels
        directory = ingest(config, tmp_path / f"{name}-shards")
        return loader.Source(
            directory, "train", SECTIONS, tokenizer, 12, **{"size": 16} | arguments
        )

    return make


def draw(batches, count):
    return list(islice(batches, count))


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_a_batch_has_the_records_it_names(make_source, tokenizer):
    source = make_source()
    batches = loader.train_loader([source], [1.0], 5, seed=0)
    for batch in draw(batches, 3):
        types = {name: (value.shape, value.dtype) for name, value in batch.items()}
        assert types == {
            "image": ((5, 16, 16), np.uint8),
            "ids": ((5, 12), np.int32),
            "mask": ((5, 12), bool),
            "index": ((5,), np.int32),
        }
        for row, index in enumerate(batch["index"]):
            record = source.records[int(index)]
            np.testing.assert_array_equal(batch["image"][row], record["image"])
            text = f"{record['findings']} {record['impression']}"
            np.testing.assert_array_equal(batch["ids"][row], tokenizer.encode([text], 12)[0][0])
            np.testing.assert_array_equal(batch["mask"][row], batch["ids"][row] != 0)
        keys = loader.record_keys([source], batch["index"])
        assert keys == [source.records[int(i)]["key"] for i in batch["index"]]
    batches.close()


def order(source, seed, count, **arguments):
    batches = loader.train_loader([source], [1.0], 1, seed, threads=0, **arguments)
    return [int(batch["index"][0]) for batch in draw(batches, count)]


def test_every_epoch_has_every_record_once_in_an_order_of_its_own(make_source):
    source = make_source()
    drawn = order(source, 0, 3 * 23)
    epochs = np.reshape(drawn, (3, 23)).tolist()
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert order(source, 0, 3 * 23) == drawn


def test_seeds_that_follow_each_other_share_no_epoch(make_source):
    source = make_source()
    epochs = [tuple(order(source, seed, 46)[e * 23 :][:23]) for seed in range(4) for e in range(2)]
    assert len(set(epochs)) == 8


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_threads_and_cache_change_nothing(make_source, cache_mib):
    source = make_source(cache_mib=cache_mib)
    plain = make_source(name="plain", cache_mib=0)
    expected = draw(loader.train_loader([plain], [1.0], 4, seed=5, threads=0), 20)
    for threads in (1, 3):
        batches = loader.train_loader([source], [1.0], 4, seed=5, threads=threads)
        for batch, wanted in zip(draw(batches, 20), expected, strict=True):
            equal(batch, wanted)
        batches.close()


def test_what_a_batch_holds_is_not_the_cache(make_source):
    source = make_source(cache_mib=64)
    first = source.take(np.arange(4))
    first["image"][:] = 0
    assert source.take(np.arange(4))["image"].any()


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(make_source, process_count):
    sources = [make_source(), make_source(30, "other")]
    whole = loader.train_loader(sources, [2.0, 1.0], 8, seed=1, threads=0)
    parts = [
        loader.train_loader(sources, [2.0, 1.0], 8 // process_count, 1, p, process_count, 0)
        for p in range(process_count)
    ]
    for expected in draw(whole, 12):
        equal(joined([next(part) for part in parts]), expected)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stream_goes_on_where_it_was_on_any_number_of_processes(make_source, threads):
    sources = [make_source(), make_source(30, "other")]
    first = loader.train_loader(sources, [1.0, 1.0], 8, seed=1, threads=threads)
    draw(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    expected = draw(first, 6)
    again = loader.train_loader(sources, [1.0, 1.0], 8, seed=1, threads=threads)
    again.set_state(state)
    for batch, wanted in zip(draw(again, 6), expected, strict=True):
        equal(batch, wanted)
    again.set_state(state)
    equal(next(again), expected[0])
    pair = [loader.train_loader(sources, [1.0, 1.0], 4, 1, p, 2, threads) for p in range(2)]
    for part in pair:
        part.set_state(state)
        assert part.get_state() == state
    for wanted in expected:
        equal(joined([next(part) for part in pair]), wanted)
    again.seek(0)
    assert again.get_state()["records"] == 0
    for part in (first, again, *pair):
        part.close()


def test_a_state_of_another_stream_is_refused(make_source):
    source = make_source()
    state = loader.train_loader([source], [1.0], 4, seed=0).get_state() | {"records": 12}
    with pytest.raises(UserError, match="other data, weights or seed"):
        loader.train_loader([source], [1.0], 4, seed=1).set_state(state)
    with pytest.raises(UserError, match="8: does not divide the 12 records"):
        loader.train_loader([source], [1.0], 8, seed=0).set_state(state)


def test_sources_mix_by_their_weights_at_every_stretch(make_source):
    sources = [make_source(20), make_source(30, "other")]
    batches = loader.train_loader(sources, [3.0, 1.0], 8, seed=0)
    drawn = draw(batches, 40)
    for batch in drawn:
        assert (batch["index"] < 20).sum() == 6
    indices = np.concatenate([batch["index"] for batch in drawn])
    assert set(indices) == set(range(50))
    # 240 draws from a source of 20 are 12 whole epochs; 80 from one of 30 are 2 and two thirds.
    counts = np.bincount(indices, minlength=50)
    assert (counts[:20] == 12).all()
    assert set(counts[20:]) == {2, 3}
    keys = loader.record_keys(sources, np.arange(50))
    assert keys[:20] == sources[0].records.keys
    assert keys[20:] == sources[1].records.keys
    for row, index in enumerate(drawn[0]["index"]):
        number, own = (0, index) if index < 20 else (1, index - 20)
        image = sources[number].records[int(own)]["image"]
        np.testing.assert_array_equal(drawn[0]["image"][row], image)


@pytest.mark.parametrize("cache_mib", [0, 64])
def test_a_record_is_read_by_one_sentence_chosen_by_its_place_in_the_stream(
    make_source, tokenizer, cache_mib
):
    source = make_source(cache_mib=cache_mib, random_sentence=True)
    plain = make_source(30, "other")
    whole = loader.train_loader([source, plain], [3.0, 1.0], 8, seed=1, threads=0)
    drawn = draw(whole, 30)
    met = {index: set() for index in range(23)}
    for batch in drawn:
        for index, ids in zip(batch["index"], batch["ids"], strict=True):
            if index < 23:
                met[index].add(tuple(ids))
            else:
                np.testing.assert_array_equal(ids, plain.take(np.array([index - 23]))["ids"][0])
    for index, texts in met.items():
        one, other = (source.records[index][name] for name in SECTIONS)
        assert texts <= set(map(tuple, tokenizer.encode([one, other], 12)[0]))
    # Of the 7 or 8 times that a record was met it is rare that all chose alike.
    assert sum(len(texts) == 2 for texts in met.values()) > 15
    parts = [loader.train_loader([source, plain], [3.0, 1.0], 4, 1, p, 2, 2) for p in range(2)]
    for part in parts:
        part.set_state({"records": 8 * 20, "order": whole.order})
    for expected in drawn[20:]:
        equal(joined([next(part) for part in parts]), expected)
    for part in parts:
        part.close()


def test_evaluation_reads_the_whole_text_of_a_source_of_random_sentences(make_source):
    source, plain = make_source(random_sentence=True), make_source(name="plain")
    for got, expected in zip(
        loader.eval_loader(source, 8), loader.eval_loader(plain, 8), strict=True
    ):
        equal(got, expected)
    assert source.texts() == plain.texts()


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (
            "Normal. The lungs are clear. No acute finding. ",
            ["The lungs are clear.", "No acute finding."],
        ),
        ("Normal. No change.", ["Normal.", "No change."]),
        ("", ["", ""]),
    ],
)
def test_a_sentence_has_three_words_if_any_has(text, chosen):
    assert [source_module._sentence(text, draw) for draw in (0.0, np.nextafter(1, 0))] == chosen


def test_sources_of_different_labels_mix(make_source):
    sources = [make_source(), make_source(name="other", labels=())]
    batches = loader.train_loader(sources, [1.0, 1.0], 4, seed=0, threads=0)
    assert sorted(next(batches)) == ["ids", "image", "index", "mask"]


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (0.0,), (-1.0,), (float("nan"),)])
def test_weights_that_do_not_fit_are_refused(make_source, weights):
    with pytest.raises(UserError, match="one positive number for each of the 1 sources"):
        loader.train_loader([make_source()], weights, 4, seed=0)


@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_evaluation_meets_every_record_once_in_order(make_source, process_count):
    source = make_source()
    parts = [loader.eval_loader(source, 4, p, process_count) for p in range(process_count)]
    steps = -(-23 // (4 * process_count))
    assert [len(part) for part in parts] == [steps] * process_count
    rounds = [joined(list(step)) for step in zip(*parts, strict=True)]
    everything = joined(rounds)
    assert everything["weight"].dtype == np.float32
    real = everything["weight"] == 1
    assert everything["index"][real].tolist() == list(range(23))
    assert set(everything["index"][~real]) <= {22}
    assert everything["mask"].any(axis=1).all()
    expected = source.take(np.arange(23))
    for name, values in expected.items():
        np.testing.assert_array_equal(everything[name][real], values)
    again = [joined(list(step)) for step in zip(*parts, strict=True)]
    equal(joined(again), everything)


def test_images_of_another_size_are_resized(make_source):
    source = make_source(size=8)
    batch = source.take(np.array([3]))
    assert batch["image"].shape == (1, 8, 8)
    expected = decode.square(source.records[3]["image"], 8)
    np.testing.assert_array_equal(batch["image"][0], expected)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_record_that_cannot_be_read_is_told_from_any_thread(make_source, threads):
    source = make_source(cache_mib=0)
    for path in source.records.directory.glob("*train*"):
        path.write_bytes(bytes(path.stat().st_size))
    batches = loader.train_loader([source], [1.0], 4, seed=0, threads=threads)
    with pytest.raises(UserError, match=r"record \d+ of train cannot be read"):
        next(batches)
    batches.close()


def test_texts_and_subjects_of_a_source(make_source):
    source = make_source()
    assert source.texts()[0] == source.records.texts(SECTIONS)[0]
    assert source.subjects() == [source.records[i]["subject"] for i in range(23)]


def test_records_without_a_report_have_the_tokens_of_an_empty_text(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    record = dict.fromkeys(schema.TEXTS, "") | {"labels": np.array([], np.int8)}
    records = []
    for i in range(3):
        png = decode.encode_png(rng.integers(0, 256, (16, 16), np.uint8))
        records.append(record | {"key": str(i), "image": png})
    write_set(tmp_path / "set", {"train": records}, [])
    source = loader.Source(tmp_path / "set", "train", SECTIONS, tokenizer, 6, 16)
    batch = next(loader.train_loader([source], [1.0], 3, seed=0))
    np.testing.assert_array_equal(batch["ids"], [[2, 3, 0, 0, 0, 0]] * 3)
    assert batch["mask"].sum() == 6


def test_the_benchmark_ends_with_whether_training_would_starve(make_source, capsys, monkeypatch):
    from scripts import bench_loader

    monkeypatch.setattr(bench_loader, "SECONDS", 0.02)
    monkeypatch.setattr(bench_loader, "loading", lambda s, b, threads, warm: 100.0 / threads)
    arguments = ["bench", "--data", str(make_source().records.directory), "--size", "16"]
    arguments += ["--tokens", "8", "--threads", "1", "2"]
    last = []
    for more in ([], ["--step-images-per-second", "90"], ["--step-images-per-second", "101"]):
        monkeypatch.setattr("sys.argv", arguments + more)
        bench_loader.main()
        last.append(capsys.readouterr().out.splitlines()[-1])
    assert last[0] == "training would starve if its step took more than 100 images/s"
    assert last[1] == "training will not wait: its 90 images/s take 90% of the loader"
    assert last[2].startswith("warning: training would starve: the loader gives 100 images/s")


def test_real_pairs_load(shared_data, tmp_path, tokenizer, make_pairs):
    config = make_pairs(size=64, workers=2)
    config.path = str(shared_data / "covid_pairs" / "pairs.csv")
    config.pairs.update({"subject": "patient", "labels": (), "view": "view"})
    directory = ingest(config, tmp_path / "covid")
    source = loader.Source(directory, "train", SECTIONS, tokenizer, 32, 64)
    batch = next(loader.train_loader([source], [1.0], 16, seed=0))
    with Image.open(Path(config.path).parent / source.records.keys[batch["index"][0]]) as image:
        direct = decode.square(np.asarray(image.convert("L")), 64).astype(int)
    assert np.abs(direct - batch["image"][0]).mean() < 2
    assert batch["mask"].sum(axis=1).min() > 2
