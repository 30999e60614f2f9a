import jax
import numpy as np
import optax
import pytest

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import optim, tree
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from tests.train import toy

KEY = jax.random.key(3)


def gradients(mesh, monkeypatch, **changed):
    """Loss, gradients and new statistics of one batch, with the state sharded over `mesh`."""
    monkeypatch.setattr(meshes, "_MIN_SHARDED", 1)
    structure, *_ = states.shapes(toy.make_model)
    state, _ = toy.setup(mesh, **changed)
    batch = meshes.to_devices(mesh, toy.batch_of(0))
    fn = jax.jit(jax.value_and_grad(toy.loss_fn_of(structure), has_aux=True))
    (loss, (stats, _)), grads = fn(state["params"], state["stats"], batch, KEY)
    return state, toy.on_host({"loss": loss, "stats": stats, "grads": grads})


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_eight_devices_give_the_loss_gradients_and_statistics_of_one(shape, monkeypatch):
    _, one = gradients(toy.one_device_mesh(), monkeypatch)
    state, many = gradients(meshes.make_mesh(*shape), monkeypatch)
    if shape[1] > 1:  # otherwise this would compare replicated states alone
        sharded = [x for x in jax.tree.leaves(state["params"]) if not x.is_fully_replicated]
        assert len(sharded) > 10
    _, nudged = gradients(toy.one_device_mesh(), monkeypatch, change=toy.nudged)
    toy.assert_equal_but_for_rounding(many, one, nudged)


def test_a_state_is_born_sharded(monkeypatch):
    monkeypatch.setattr(meshes, "_MIN_SHARDED", 1)
    _, params, _ = states.shapes(toy.make_model)
    mesh, key = meshes.make_mesh(2, 4), jax.random.key(0)
    state = states.create(toy.make_model, toy.make_tx(params, 1e-3), mesh, toy.RULES, key)
    kernel = state["params"]["image"]["stages"]["3"]["0"]["convs"]["0"]["conv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[-1] == kernel.shape[-1] // 4
    for name, value in tree.named(toy.on_host(state)).items():
        np.testing.assert_allclose(value, tree.named(toy.initial())[name], atol=1e-6, err_msg=name)


def test_a_step_moves_everything_and_counts():
    mesh = meshes.make_mesh()
    state, step = toy.setup(mesh)
    before = toy.on_host(state["params"])
    state, metrics = step(state, meshes.to_devices(mesh, toy.batch_of(0)), KEY)
    assert int(state["step"]) == 1
    assert float(metrics["grad_norm"]) > 0
    for name, new in tree.named(toy.on_host(state["params"])).items():
        if name.endswith("kernel"):
            assert not np.array_equal(new, tree.named(before)[name]), name


def test_accumulation_averages_the_micro_batches():
    mesh = toy.one_device_mesh()
    structure, *_ = states.shapes(toy.make_model)
    batch = toy.batch_of(0)
    state, step = toy.setup(mesh, accumulate=2)
    params, stats = toy.on_host((state["params"], state["stats"]))
    _, metrics = step(state, meshes.to_devices(mesh, batch), KEY)
    keys = jax.random.split(jax.random.fold_in(KEY, 0), 2)
    losses = []
    loss_fn = jax.jit(toy.loss_fn_of(structure))
    for i, key in enumerate(keys):  # micro-batch i holds every second record
        part = {name: value[i::2] for name, value in batch.items()}
        loss, (stats, _) = loss_fn(params, stats, jax.tree.map(jax.numpy.asarray, part), key)
        losses.append(float(loss))
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    np.testing.assert_allclose(float(metrics["loss"]), np.mean(losses), rtol=1e-5)


def test_the_same_step_is_the_same_whatever_ran_before():
    mesh = meshes.make_mesh()
    batch = meshes.to_devices(mesh, toy.batch_of(0))
    first = [float(s(st, batch, KEY)[1]["loss"]) for st, s in (toy.setup(mesh), toy.setup(mesh))]
    assert first[0] == first[1]


def test_frozen_parameters_cost_no_gradient_and_count_in_no_norm():
    structure, params, _ = states.shapes(toy.make_model)
    frozen = ("image/.*", "image_head/.*")
    state, _ = toy.setup(toy.one_device_mesh())
    batch = jax.tree.map(jax.numpy.asarray, toy.batch_of(0))

    def lowered(frozen):
        tx = optim.adamw(params, optax.constant_schedule(1e-3), frozen=frozen)
        step = jax.jit(steps.make_step(toy.loss_fn_of(structure), tx, frozen=frozen))
        inputs = {**state, "opt": tx.init(state["params"])}
        return inputs, step.lower(inputs, batch, KEY).compile()

    (inputs, free), (still, cheap) = lowered(()), lowered(frozen)
    assert cheap.cost_analysis()["flops"] < 0.6 * free.cost_analysis()["flops"]
    assert float(cheap(still, batch, KEY)[1]["grad_norm"]) > 0
    assert float(cheap(still, batch, KEY)[1]["grad_norm"]) < float(
        free(inputs, batch, KEY)[1]["grad_norm"]
    )


def test_the_statistics_of_a_frozen_part_stay():
    structure, params, _ = states.shapes(toy.make_model)
    frozen = ("image/.*",)
    tx = optim.adamw(params, optax.constant_schedule(1e-3), frozen=frozen)
    state = {**toy.initial(), "opt": tx.init(toy.initial()["params"])}
    step = jax.jit(steps.make_step(toy.loss_fn_of(structure), tx, 2, frozen))
    new, _ = step(state, toy.batch_of(0), KEY)
    for part in ("params", "stats"):
        old, moved = tree.named(state[part]), tree.named(toy.on_host(new[part]))
        same = {name for name in old if np.array_equal(old[name], moved[name])}
        assert {n for n in old if n.startswith("image/")} <= same
        assert not {n for n in same if n.startswith("image_head/") and "bias" not in n}
