"""Malformed pipelines, shards, configs and workdirs for `scripts/fuzz.py`."""

import csv
import json
import os
import re
import shutil
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from configs import ingest as ingest_configs
from medsyn_jax import main
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import outputs
from medsyn_jax.data.sources import ingestion, plan
from medsyn_jax.data.store import shards
from medsyn_jax.data.text import tokenizers
from medsyn_jax.diffusion import generator, schedule
from medsyn_jax.models.diffusion import pipeline as pipelines
from medsyn_jax.tasks import generate, study
from medsyn_jax.train import features, frozen, heads, logistic, loop, probe
from scripts import random_pipeline
from scripts.fuzz_inputs import bent_bytes, bent_json, check, json_bytes

_BASE: dict[str, Any] = {}

# --- pipelines ----------------------------------------------------------------------------------

_JSONS = [f"{part}/config.json" for part in pipelines.PARTS]
_JSONS += ["scheduler/scheduler_config.json", "model_index.json"]
_TOKENIZER = [f"tokenizer/{n}" for n in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")]


def pipelines_prepare(folder: Path) -> None:
    root = folder / "pipeline"
    random_pipeline.write(root)
    _BASE["pipelines"] = root, pipelines.read(root)


def pipeline_case(rng: Random, folder: Path) -> None:
    root, sound = _BASE["pipelines"]
    to = folder / "pipeline"
    shutil.copytree(root, to, copy_function=os.symlink)
    name = rng.choice(_JSONS + _TOKENIZER)
    data = (root / name).read_bytes()
    if name.endswith(".txt") or rng.random() < 0.1:
        data = bent_bytes(rng, data)
    else:
        value = json.loads(data)
        if name.endswith("config.json") and rng.random() < 0.4:
            value |= rng.choice(_MORE)
        data = json_bytes(rng, bent_json(rng, value))
    (to / name).unlink()
    if rng.random() < 0.97:
        (to / name).write_bytes(data)
    part = name.partition("/")[0]
    read = pipelines.read(to, [part] if part in pipelines.PARTS else [], report=str)
    whole = pipelines.Pipeline({**sound.parts, **read.parts}, read.scheduler, read.tokenizer)
    if part == "tokenizer":
        ids, mask = tokenizers.load(to / part).encode(["The lungs are clear.", ""], 8)
        check(ids.shape == mask.shape == (2, 8) and ids.min() >= 0, "no ids", ids)
    sampler, steps = rng.choice(schedule.SAMPLERS), rng.choice((1, 4, 50))
    table = generator.check(whole, generator.Sampling(sampler, steps, 2.0), rng.choice((0, 16)))
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves(table))
    check(finite, "a table that is not finite", sampler)
    check(0 < whole.scaling_factor < np.inf, "a scaling factor", whole.scaling_factor)
    check(0 < generator.native_size(whole) <= 2**20, "a size", generator.native_size(whole))


_MORE = (
    {"act_fn": "gelu", "dropout": 0.1, "mid_block_type": None, "time_embedding_type": "fourier"},
    {"hidden_act": ["gelu"], "layer_norm_eps": "x", "attention_dropout": [0]},
    {"layers_per_block": 16, "transformer_layers_per_block": 40, "norm_eps": float("nan")},
    {"scaling_factor": -8, "sample_size": 0, "latents_mean": [0]},
    {"prediction_type": "x", "timestep_spacing": "x", "steps_offset": -1, "trained_betas": [1]},
    {"num_train_timesteps": 10**11, "beta_start": "x", "rescale_betas_zero_snr": 1},
)

# --- shards -------------------------------------------------------------------------------------


def shards_prepare(folder: Path) -> None:
    config = ingest_configs.get_config("smoke").ingest
    config.update({"size": 32, "records_per_shard": 3, "split_shares": (0.4, 0.3, 0.3)})
    config.phantom.subjects = 6
    todo = plan.make_plan(config)
    root = ingestion.ingest(config, folder / "set", todo)
    opened = {name: shards.open_split(root, name) for name in _having(root)}
    read = {name: [part[i] for i in range(len(part))] for name, part in opened.items()}
    files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    _BASE["shards"] = config, todo, files, read


def _having(root: Path) -> list[str]:
    """Names of the splits that have records."""
    return [name for name, part in shards.describe(root)["splits"].items() if part["records"]]


def shard_case(rng: Random, folder: Path) -> None:
    config, todo, files, read = _BASE["shards"]
    root = folder / "set"
    _bend_set(rng, root, files)
    refused = None
    try:
        opened = {name: shards.open_split(root, name) for name in _having(root)}
        check(opened.keys() == read.keys(), "splits are lost", list(opened))
        for name, records in opened.items():
            check(len(records) == len(read[name]), "records are lost", name)
            keys = [record["key"] for record in read[name]]
            check(records.keys == keys, "other keys", name)
            for i, sound in enumerate(read[name]):
                check(_same(records[i], sound), "another record", (name, i))
    except shards.UserError as error:
        refused = error  # the next ingestion must repair the set
    ingestion.ingest(config, root, todo)
    for name, data in files.items():
        if name.endswith((".lock", ".texts.json")) or "array_record-" in name.partition("/")[0]:
            continue  # records are checked above; a complete set needs no counts of texts
        same = (root / name).exists() and _content(root / name) == _content(name, data)
        check(same, f"a fault left after ingestion in {name.partition('/')[0]}", name)
    if refused is not None:
        raise refused


def _content(path: Path | str, data: bytes | None = None) -> Any:
    """The content that ingestion guarantees: the number of reasons, no wording of texts."""
    data = Path(path).read_bytes() if data is None else data
    if Path(path).suffix == ".csv":
        return len(list(csv.reader(data.decode(errors="replace").splitlines())))
    if Path(path).suffix != ".json":
        return data
    vague = ("description", "left_out", "version", "rejects")
    # The byte count of a note, numBytes in TFDS, is trusted: checking it would read all records.
    text = re.sub(r'"numBytes": "\d+"', '"numBytes": "0"', data.decode())
    text = re.sub(r'(?<=[\[\s])"(\d+)"(?=[,\]\s])', r"\1", text)  # as valid in shardLengths
    return {k: v for k, v in json.loads(text).items() if k in _KNOWN and k not in vague}


_KNOWN = ("format", "label_names", "splits", "fingerprint", "settings", "files", "name")
_KNOWN += ("fileFormat", "featuresDict", "split", "keys", "optional", "size")


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    same = lambda x, y: np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y  # noqa: E731
    plain = [k for k in b if k != "boxes"]
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in plain)


def _bend_set(rng: Random, root: Path, files: dict[str, bytes]) -> None:
    """Write the set with one or two of its files altered, missing, or replaced by another file."""
    bent = dict(files)
    for _ in range(rng.choice((1, 1, 2))):
        folders = sorted({name.partition("/")[0] for name in files if name != ".lock"})
        chosen = rng.choice([n for n in folders if "array_record" not in n] * 2 + folders)
        name = rng.choice([n for n in sorted(files) if n.partition("/")[0] == chosen])
        how = rng.randrange(8)
        if how == 0:
            bent.pop(name, None)
        elif how == 1:
            bent[name] = files[rng.choice(sorted(files))]
        elif how < 6 and name.endswith(".json"):
            bent[name] = json_bytes(rng, bent_json(rng, json.loads(files[name])))
        elif name.endswith((".txt", ".csv")) and how < 4:
            lines = files[name].splitlines(True) or [b""]
            bent[name] = b"".join(rng.sample(lines, rng.randint(0, len(lines)))) + b"extra\n"
        else:
            bent[name] = bent_bytes(rng, files[name])
    for name, data in bent.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


# --- configs ------------------------------------------------------------------------------------

_CONFIGS = sorted(p.stem for p in Path("configs").glob("*.py") if p.stem != "common")
# Fields that may ask for much work, which is no fault.
_COUNTS = ("subjects", "studies_per_subject", "ingest.size", "seeds", "draws", "subsets", "epochs")
_VALUES = ("nan", "inf", "-inf", "-1", "0", "1", "2", "3", "0.5", "1e-320", "1e308", "2147483648")
_VALUES += ("99999999999999999999", "", "x", "None", "True", "()", "(1,)", "(0.2,)", "(1, 2)", "[]")
_VALUES += ("('80%', '10%', '10%')", "('x',)", "(None,)", "((),)", "(nan, 1)", "'x'", "{'a': 1}")
_VALUES += ("(1.0, 0.0)", "('(',)", "('.*',)", "../x", "/", "\0", "[red]", "é", "(0.5,0.25,0.25)")


class Done(BaseException):
    """All checks have passed; the work would begin here."""


def configs_prepare(folder: Path) -> None:
    """Make a pre-training run with a checkpoint of its start, and two sets of shards."""
    runs = folder / "runs"
    _BASE["configs"] = folder

    def saved(trainer: Any, state: Any) -> None:
        trainer.checkpoints.save(jax.tree.map(np.asarray, state), {}, 1.0)
        trainer.checkpoints.wait()
        trainer.checkpoints.close()
        raise Done

    argv = ["main", "--config=configs/gloria.py:smoke", f"--workdir={runs / 'encoder'}"]
    argv.append("--config.ingest.workers=1")  # the fourth argument: the ones after it may be odd
    _run(argv, saved)
    data = next((runs / "data").iterdir())
    shutil.copytree(data, runs / "set")


_jit = jax.jit


def _traced(fn: Any = None, **options: Any) -> Any:
    """Replaces `jax.jit`: finds every error of shapes, and returns zeros."""
    if fn is None:
        return partial(_traced, **options)

    def zeros(*args: Any, **kwargs: Any) -> Any:
        shapes = _jit(fn, **options).eval_shape(*args, **kwargs)
        if sum(np.prod(s.shape, dtype=float) for s in jax.tree.leaves(shapes)) > 1e8:
            raise Done  # the config asks for large arrays, so this is no fault
        return jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype)), shapes)

    return zeros


def _begin(trainer: Any, state: Any) -> None:
    """Replaces training: one batch and, in some cases since it takes seconds, a traced step."""
    try:
        batch = meshes.to_devices(trainer.mesh, next(trainer.batches))
        if _BASE["traced"]:
            trainer.step(state, batch, trainer.key)
    finally:
        trainer.batches.close()
        trainer.log.close()
        trainer.checkpoints.close()
    raise Done


def _table(encoder: Any, records: shards.Records, *_: Any, **__: Any) -> features.Table:
    rng = np.random.default_rng(len(records))
    labels = np.stack([shards.value(records.features(i), "labels") for i in range(len(records))])
    values = rng.random((len(records), 4), np.float32)
    return features.Table(values, labels, np.array(records.subjects()))


def _done(*_: Any, **__: Any) -> None:
    raise Done


def _run(argv: list[str], training: Any = _begin) -> None:
    """Parse a command line as `main` does, and run its task up to where the work begins."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "", lock_config=True, flag_values=values
    )
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    with ExitStack() as stack:
        for place, name, value in (
            (main.flags, "FLAGS", values),
            (main, "_CONFIG", config),
            (main, "_WORKDIR", workdir),
            (sys, "argv", argv),  # ml_collections reads the fields from there
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        parsed, where = main.parse(argv)
    stops = [(probe, "fit"), (logistic, "fit"), (frozen, "heat_maps"), (generate, "_generator")]
    stops += [(heads, "fit"), (frozen, "embeddings"), (study, "_Runner")]
    if "ingest.py" not in argv[1] and any("config.ingest" in a for a in argv[4:]):
        stops.append((ingestion, "_write_parts"))
    with ExitStack() as stack:
        for place, name in stops:
            stack.enter_context(mock.patch.object(place, name, _done))
        for place, name, value in (
            (jax, "jit", _traced),
            (loop, "fit", training),
            (features, "table", _table),
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        check(parsed.task in main.TASKS, "an unknown task", parsed.task)
        main._make(where)
        with suppress(Done, MemoryError):  # `main` reports a MemoryError
            main.run(parsed, where)


def config_case(rng: Random, folder: Path) -> None:
    runs = _BASE["configs"] / "runs"
    if rng.random() < 0.1:
        _workdir_case(rng, folder, runs)
        return
    name = rng.choice(_CONFIGS)
    argv = ["main", f"--config=configs/{name}.py:smoke", f"--workdir={runs / 'new'}"]
    argv.append("--config.ingest.workers=1")
    shutil.rmtree(runs / "new", ignore_errors=True)
    _BASE["traced"] = rng.random() < 0.3
    overrides = {"encoder.workdir": str(runs / "encoder"), "synthetic": str(runs / "set")}
    overrides |= {"pipeline": "assets/phantom-diffusion"} if name == "generate" else {}
    fields = _fields(name)
    for field in rng.sample(sorted(fields), rng.choice((1, 1, 1, 2))):
        value = rng.choice(_VALUES)
        if any(word in field for word in _COUNTS) and len(value) > 4:
            value = "inf"
        overrides[field] = value
    argv += [f"--config.{field}={value}" for field, value in overrides.items() if field in fields]
    _run(argv)


def _fields(name: str) -> set[str]:
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    config = json.loads(module.get_config("smoke").to_json())
    return {field for field in outputs.flat(config) if field != "task"}


def _workdir_case(rng: Random, folder: Path, runs: Path) -> None:
    """Open the workdir of a run whose config.json is malformed."""
    shutil.copytree(runs / "encoder", folder / "run", symlinks=True)
    path = folder / "run" / "config.json"
    path.write_bytes(json_bytes(rng, bent_json(rng, json.loads(path.read_text()))))
    config = ingest_configs.get_config("smoke")
    with mock.patch.object(jax, "jit", _traced):
        rng.choice(
            (
                lambda: outputs.check_config(folder / "run", config),
                lambda: frozen.pretrained(folder / "run"),
                lambda: frozen.untrained(folder / "run", 0),
                lambda: frozen.pretrained_pair(folder / "run"),
            )
        )()
