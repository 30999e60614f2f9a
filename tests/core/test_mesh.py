import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError


def test_one_axis_takes_the_rest():
    assert dict(meshes.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(meshes.make_mesh(data=2, fsdp=-1).shape) == {"data": 2, "fsdp": 4}


@pytest.mark.parametrize("shape", [(3, -1), (2, 2), (16, 1), (0, 8), (-1, -1)])
def test_a_mesh_that_does_not_fit_the_devices(shape):
    with pytest.raises(UserError, match="does not fit the 8 devices"):
        meshes.make_mesh(*shape)


def test_a_batch_that_the_mesh_does_not_divide():
    mesh = meshes.make_mesh()
    assert meshes.per_process(64, mesh) == 64
    with pytest.raises(UserError, match=r"batch_size: 20 does not divide over 8 devices.*of 8"):
        meshes.per_process(20, mesh)
    with pytest.raises(UserError, match=r"8 devices x 4 micro-batches: use a multiple of 32"):
        meshes.per_process(16, mesh, accumulate=4)


def test_fsdp_shards_the_largest_axis_that_divides_and_leaves_small_leaves_whole():
    mesh = meshes.make_mesh(data=2, fsdp=4)
    shapes = {
        "wide": jax.ShapeDtypeStruct((128, 512), np.float32),
        "odd": jax.ShapeDtypeStruct((1024, 1023), np.float32),
        "small": jax.ShapeDtypeStruct((64,), np.float32),
        "prime": jax.ShapeDtypeStruct((1021, 1023), np.float32),
    }
    placed = {k: v.spec for k, v in meshes.shardings(mesh, shapes).items()}
    assert placed == {"wide": P(None, "fsdp"), "odd": P("fsdp"), "small": P(), "prime": P()}
    rules = (("wide", ""), (".*", "fsdp"))
    assert meshes.shardings(mesh, shapes, rules)["wide"].spec == P()


def test_batches_go_to_all_devices_and_come_back_whole():
    mesh = meshes.make_mesh(data=4, fsdp=2)
    x = np.arange(16, dtype=np.int32)
    placed = meshes.to_devices(mesh, {"x": x})["x"]
    assert len({s.device for s in placed.addressable_shards}) == 8
    np.testing.assert_array_equal(meshes.to_host(placed), x)


def test_coordinator_needs_its_numbers(monkeypatch):
    monkeypatch.setenv("MEDSYN_COORDINATOR", "localhost:1")
    monkeypatch.setenv("MEDSYN_PROCESSES", "two")
    with pytest.raises(UserError, match="must be whole numbers"):
        meshes.initialize()


def test_processes_that_see_each_other_but_never_met_are_told_how(monkeypatch):
    assert meshes.from_first("here", "folder") == "here"  # a process alone
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for wait in (lambda: meshes.wait_for_all("done"), lambda: meshes.from_first("here", "folder")):
        with pytest.raises(UserError, match=r"4 processes .* set MEDSYN_DISTRIBUTED=1 on each"):
            wait()
