import functools
import gc
import json
import resource
import shutil
import signal

import jax
import numpy as np
import pytest

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.models import towers
from medsyn_jax.train import checkpoint, frozen
from medsyn_jax.train.checkpoint import Checkpoints
from tests.train import toy

KEY = jax.random.key(1)

# When a read or a save fails, threads of Orbax call its closed event loop some time later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _shard_small_leaves(monkeypatch):
    monkeypatch.setattr(meshes, "_MIN_SHARDED", 1)


@functools.cache
def compiled_step(mesh):
    """One program for all tests of this module: a step takes longer to compile than to run."""
    return toy.setup(mesh)[1]


def setup(mesh):
    """(new state, jitted step) on `mesh`."""
    return toy.start(mesh), compiled_step(mesh)


def trained(mesh, steps=2):
    state, step = setup(mesh)
    for i in range(steps):
        state, _ = step(state, meshes.to_devices(mesh, toy.batch_of(i)), KEY)
    return state, step


def assert_same(a, b):
    a, b = tree.named(toy.on_host(a)), tree.named(toy.on_host(b))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("way", ["8 to 1", "1 to 8", "data 8 to data 2 x fsdp 4"])
def test_a_checkpoint_restores_on_other_devices(tmp_path, way):
    one, eight, fsdp = toy.one_device_mesh(), meshes.make_mesh(), meshes.make_mesh(2, 4)
    source, target = {
        "8 to 1": (fsdp, one),
        "1 to 8": (one, fsdp),
        "data 8 to data 2 x fsdp 4": (eight, fsdp),
    }[way]
    state, _ = trained(source)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"batches": {"position": 2}})
    checkpoints.wait()
    fresh, step = setup(target)
    restored = checkpoints.restore(2, fresh)
    assert_same(state, restored)
    assert {d for x in jax.tree.leaves(restored) for d in x.devices()} == set(target.devices.flat)
    assert checkpoints.meta(2) == {"step": 2, "batches": {"position": 2}}
    step(restored, meshes.to_devices(target, toy.batch_of(2)), KEY)


def test_saving_in_the_background_is_not_disturbed_by_the_next_steps(tmp_path):
    mesh = meshes.make_mesh()
    state, step = trained(mesh)
    copy = toy.on_host(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    for i in range(3):  # these reuse the donated buffers of the state being written
        state, _ = step(state, meshes.to_devices(mesh, toy.batch_of(i)), KEY)
    checkpoints.wait()
    assert_same(checkpoints.restore(2, setup(mesh)[0]), copy)


def test_the_best_and_the_latest_are_kept(tmp_path):
    mesh = toy.one_device_mesh()
    state, step = setup(mesh)
    checkpoints = Checkpoints(tmp_path)
    for i, score in enumerate([3.0, 1.0, None, 2.0, None]):
        state, _ = step(state, meshes.to_devices(mesh, toy.batch_of(i)), KEY)
        checkpoints.save(state, {}, score)
    checkpoints.wait()
    assert (checkpoints.best(), checkpoints.latest()) == (2, 5)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 4, 5]
    checkpoints.close()
    again = Checkpoints(tmp_path)
    assert (again.best(), again.latest()) == (2, 5)


def save_and_wait(checkpoints, state):
    checkpoints.save(state, {})
    checkpoints.wait()


@pytest.mark.parametrize("damage", ["a part is gone", "a file is gone", "a file is cut short"])
def test_a_half_written_checkpoint_is_named(tmp_path, damage):
    state, _ = trained(toy.one_device_mesh())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    checkpoints.close()
    part = tmp_path / "2" / "params"
    if damage == "a part is gone":
        shutil.rmtree(part)
    elif damage == "a file is gone":
        (part / "manifest.ocdbt").unlink()
    else:
        largest = max((p for p in part.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint .*/2 is incomplete .* move this folder away"):
        Checkpoints(tmp_path).restore(2, state)
    gc.collect()


def test_a_folder_that_a_kill_left_unfinished_is_passed_over(tmp_path):
    state, _ = trained(toy.one_device_mesh())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    checkpoints.close()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).latest() == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path):
    """A limit on the size of files is the nearest to a full disk that a test can make."""
    state, step = trained(toy.one_device_mesh())
    first = toy.on_host(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    state, _ = step(state, meshes.to_devices(toy.one_device_mesh(), toy.batch_of(2)), KEY)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="disk full"):
            save_and_wait(checkpoints, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    again = Checkpoints(tmp_path)
    assert again.latest() == 2
    assert_same(again.restore(2, setup(toy.one_device_mesh())[0]), first)
    del checkpoints  # what it left undone is to be complained of here, not in a later test
    gc.collect()


def test_one_encoder_out_of_a_run(tmp_path, monkeypatch):
    state, _ = trained(meshes.make_mesh())
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, {})
    checkpoints.wait()

    def make(rngs):
        return towers.image_encoder(toy.IMAGE, jax.numpy.float32, rngs)

    closed, close = [], Checkpoints.close
    monkeypatch.setattr(Checkpoints, "close", lambda self: closed.append(close(self)))
    _, params, stats, step = checkpoint.restore(tmp_path, make, "image")
    assert (step, len(closed)) == (2, 1)
    assert_same(params, state["params"]["image"])
    assert_same(stats, state["stats"]["image"])
    other = dict(toy.IMAGE, depths=(2, 1, 1, 1))
    with pytest.raises(UserError, match=r"does not fit its config: .*missing"):
        checkpoint.restore(
            tmp_path, lambda rngs: towers.image_encoder(other, jax.numpy.float32, rngs), "image"
        )


def test_a_checkpoint_with_the_pooler_of_earlier_versions(tmp_path):
    """Training goes on and encoders are read without these weights, which nothing ever read."""
    state, step = setup(toy.one_device_mesh())
    pooler = {"kernel": np.ones((16, 16), np.float32), "bias": np.ones(16, np.float32)}
    params = state["params"] | {"text": state["params"]["text"] | {"pooler": pooler}}
    old = state | {"params": params, "opt": toy.make_tx(params, 1e-3).init(params)}
    assert sum("text/pooler/" in name for name in tree.named(old)) == 6  # with both moments
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save_and_wait(checkpoints, old)
    assert_same(checkpoints.restore(0, state), state)
    saved, stats = checkpoints.restore_all(0, ("params", "stats"))
    assert saved.keys() == tree.named(state["params"]).keys()
    assert stats.keys() == tree.named(state["stats"]).keys()

    def make(rngs):
        return towers.text_encoder(toy.TEXT | {"pooler": True}, 20, jax.numpy.float32, rngs)

    assert_same(checkpoint.restore(tmp_path, make, "text")[1], state["params"]["text"])
    batch = meshes.to_devices(toy.one_device_mesh(), toy.batch_of(0))
    moved, _ = step(checkpoints.restore(0, state), batch, KEY)
    assert int(moved["step"]) == 1


def test_no_run_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoints there"):
        checkpoint.restore(tmp_path, toy.make_model, "image")
    with pytest.raises(UserError, match="not the workdir of a pre-training run"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"config": {"task": "ingest", "ingest": {}}}', "its task is 'ingest'"),
        ('{"config": {"image": {}, "data": 3}}', "its config has no section data"),
        ("[]", "TypeError reading config.json"),
        ('{"config": []}', "AttributeError reading config.json"),
    ],
)
def test_the_workdir_of_another_task_is_one_line(tmp_path, text, reason):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UserError, match=rf"not the workdir of a pre-training run \({reason}\): run"
    ):
        checkpoint.check_run(tmp_path)


@pytest.mark.parametrize(
    ("section", "bent"),
    [
        ("image", {"depths": "x"}),
        ("image", {"width": 8.5}),
        ("image", {"stem": [1]}),
        ("augment", {"size": None}),
    ],
)
def test_a_config_that_describes_no_model_is_one_line(tmp_path, section, bent):
    config = {"dtype": "float32", "data": {"size": 16}, "augment": {"size": 16}}
    config["image"] = toy.IMAGE | {"mean": 0.5, "std": 0.5}
    config[section] |= bent
    if bent == {"size": None}:
        del config["augment"]["size"]
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    with pytest.raises(UserError, match=r"config\.json: describes no model that can be built"):
        frozen.untrained(tmp_path, 0)
