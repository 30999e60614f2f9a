import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medsyn_jax.core import optim, tree
from medsyn_jax.core.errors import UserError

PARAMS = {
    "text": {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.full(2, 2.0)},
    "image": {"kernel": jnp.full((2, 2), 2.0)},
}


def run(tx, steps=1, grads=None):
    params, opt = PARAMS, tx.init(PARAMS)
    grads = grads or jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(steps):
            updates, opt = tx.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
    return params, opt


def test_schedule_warms_up_then_follows_the_cosine():
    with jax.numpy_dtype_promotion("standard"):
        schedule = optim.warmup_cosine(1.0, steps=100, warmup=40, end=0.1)
        values = [float(schedule(i)) for i in (0, 20, 40, 70, 100)]
    np.testing.assert_allclose(values, [0, 0.5, 1.0, 0.55, 0.1], atol=1e-6)


def test_decay_is_for_kernels_only():
    params, _ = run(optim.adamw(PARAMS, optax.constant_schedule(0.1), weight_decay=0.5))
    np.testing.assert_allclose(params["text"]["kernel"], 2.0 - 0.1 * 0.5 * 2.0)
    np.testing.assert_array_equal(params["text"]["bias"], 2.0)


def test_adamw_is_optax_adamw_without_rules():
    grads = jax.tree.map(
        lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), PARAMS
    )
    every = ((".*", True),)
    ours, _ = run(
        optim.adamw(PARAMS, optax.constant_schedule(0.1), weight_decay=0.3, decay=every), 3, grads
    )
    theirs, _ = run(optax.adamw(0.1, weight_decay=0.3), 3, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_frozen_leaves_stay_and_hold_no_state():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    tx = optim.adamw(PARAMS, optax.constant_schedule(0.1), weight_decay=0.5, frozen=("text/.*",))
    params, opt = run(tx, 2, grads)
    np.testing.assert_array_equal(params["text"]["kernel"], PARAMS["text"]["kernel"])
    assert (params["image"]["kernel"] < 2.0).all()
    assert not [name for name in tree.named(opt) if "text" in name]


def test_clipping_counts_trained_leaves_only():
    grads = {
        "text": {"kernel": jnp.full((3, 2), 1e6), "bias": jnp.zeros(2)},
        "image": {"kernel": jnp.full((2, 2), 0.5)},
    }
    free = optim.adamw(PARAMS, optax.constant_schedule(1.0), eps=1.0, frozen=("text/.*",))
    clipped = optim.adamw(
        PARAMS, optax.constant_schedule(1.0), eps=1.0, clip=1.0, frozen=("text/.*",)
    )
    np.testing.assert_allclose(
        run(free, 1, grads)[0]["image"]["kernel"], run(clipped, 1, grads)[0]["image"]["kernel"]
    )
    tight = optim.adamw(
        PARAMS, optax.constant_schedule(1.0), eps=1.0, clip=0.1, frozen=("text/.*",)
    )
    # a norm of 1 clipped to .1: gradients of .05, and Adam's first step is g / (g + eps)
    np.testing.assert_allclose(
        run(tight, 1, grads)[0]["image"]["kernel"], 2 - 0.05 / 1.05, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("frozen", "says"),
    [
        (("txet/.*",), "matches no parameter"),
        (("text/(",), "is no regex"),
        ((".*",), "every parameter"),
    ],
)
def test_freezing_rules_that_cannot_be_meant(frozen, says):
    with pytest.raises(UserError, match=says):
        optim.adamw(PARAMS, optax.constant_schedule(0.1), frozen=frozen)


def test_positions_and_token_types_are_not_decayed():
    decayed = {
        name: tree.match(optim.DECAY_RULES, f"text/embeddings/{name}/table")
        for name in ("word", "position", "type")
    }
    assert decayed == {"word": True, "position": False, "type": False}


def test_what_is_held_moves_later_and_unit_rows_stay_so():
    params = {"a": jnp.ones((2, 3)), "p": jnp.array([[0.6, 0.8], [1.0, 0.0]])}
    tx = optim.adamw(
        params, lambda _: 0.1, weight_decay=0.1, held=("p",), held_steps=2, unit_rows=("p",)
    )
    state, start = tx.init(params), params
    for step in range(4):
        grads = {"a": params["a"], "p": params["p"] + 0.5}
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(jnp.linalg.norm(params["p"], axis=1), 1, rtol=1e-6)
        assert bool((params["p"] == start["p"]).all()) == (step < 2)
    assert not (params["a"] == start["a"]).any()


@jax.numpy_dtype_promotion("standard")
def test_what_was_held_starts_as_if_the_run_began_at_its_release():
    """Adam's first step has the size of the learning rate, after a hold as without one, and what is
    held does not count in the norm that gradients are clipped to."""
    params = {"a": jnp.ones(3), "p": jnp.ones(3)}
    grads = {"a": jnp.array([3.0, 0.0, 4.0]), "p": jnp.array([1e3, -1e3, 1e3])}
    steps = 50
    held = optim.adamw(params, lambda _: 0.1, clip=5.0, held=("p",), held_steps=steps)
    free = optim.adamw(params, lambda _: 0.1, clip=5.0)
    state = held.init(params)
    for _ in range(steps):
        updates, state = held.update(grads, state, params)
        assert not updates["p"].any()
    alone = optim.adamw({"a": params["a"]}, lambda _: 0.1)
    expected, _ = alone.update(
        {"a": grads["a"]}, alone.init({"a": params["a"]}), {"a": params["a"]}
    )
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-5)
    start = free.init(params)
    for _ in range(3):
        first, start = free.update(grads, start, params)
        updates, state = held.update(grads, state, params)
        np.testing.assert_allclose(updates["p"], first["p"], rtol=1e-5)


@pytest.mark.parametrize("field", ["frozen", "held", "unit_rows"])
def test_a_rule_that_matches_nothing_is_refused(field):
    with pytest.raises(UserError, match=rf"config.optim.{field}: 'q' matches no parameter"):
        optim.adamw({"p": jnp.ones(2)}, lambda _: 0.1, **{field: ("q",)})
