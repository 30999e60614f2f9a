"""A pair encoder small enough for tests, and batches for it."""

import functools
import re

import jax
import numpy as np
import optax
from flax import nnx

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import optim, tree
from medsyn_jax.models.layers import statistics
from medsyn_jax.models.towers import PairEncoder
from medsyn_jax.objectives.contrastive import contrastive_loss
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps

IMAGE = {"depths": (1, 1, 1, 1), "width": 8, "block": "basic", "channels": 1, "stem": "3x3"}
IMAGE |= {"kind": "resnet", "remat": False}
TEXT = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "max_length": 8, "types": 2}
TEXT |= {"dropout": 0.1, "eps": 1e-12, "remat": False, "pooling": "mean"}
TEXT["summed"] = 1
HEADS = {"kind": "normed", "hidden": 16, "width": 8, "text": True, "local": False}
HEADS["prototypes"] = 0
RULES = ((".*", "fsdp"),)


def make_model(rngs: nnx.Rngs) -> PairEncoder:
    return PairEncoder(IMAGE, TEXT, HEADS, vocab_size=20, rngs=rngs)


def loss_fn_of(structure):
    def loss_fn(params, stats, batch, key):
        model = nnx.merge(structure, params, stats, copy=True)
        e = model(batch["image"], batch["ids"], batch["mask"], train=True, key=key)
        loss, metrics = contrastive_loss(e.image, e.text, temperature=0.1)
        return loss, (statistics(model), metrics)

    return loss_fn


def batch_of(seed: int, size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    length = rng.integers(2, 9, size=(size, 1))
    return {
        "image": rng.normal(size=(size, 16, 16, 1)).astype(np.float32),
        "ids": rng.integers(20, size=(size, 8)).astype(np.int32),
        "mask": np.arange(8) < length,
        "index": np.arange(size, dtype=np.int32) + 100 * seed,
    }


class Batches:
    """The endless iterator that the loop wants; batch i is a function of i."""

    def __init__(self, size: int = 16):
        self.position, self.size = 0, size

    def __next__(self):
        self.position += 1
        return batch_of(self.position - 1, self.size)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def close(self):
        pass


@functools.cache
def initial() -> states.State:
    """The state that every test starts from, on the host."""
    _, params, _ = states.shapes(make_model)
    tx = make_tx(params, 1e-3)
    state = states.create(make_model, tx, one_device_mesh(), RULES, jax.random.key(0))
    return on_host(state)


def make_tx(params, lr):
    return optim.adamw(params, optax.constant_schedule(lr), weight_decay=0.01, clip=1.0)


def setup(mesh, accumulate: int = 1, lr: float = 1e-3, change=lambda params: params):
    """(state, jitted step) on `mesh`, with the initial parameters changed so."""
    structure, params, _ = states.shapes(make_model)
    state = start(mesh, change)
    step = steps.make_step(loss_fn_of(structure), make_tx(params, lr), accumulate)
    return state, steps.compile_step(step, state, mesh)


def start(mesh, change=lambda params: params) -> states.State:
    """The state on `mesh` before the first step, with the initial parameters changed so."""
    state = initial() | {"params": change(initial()["params"])}
    placed = meshes.shardings(mesh, state, RULES)
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), state, placed
    )


def nudged(params):
    """The parameters, each one rounding (2^-23 of itself) up or down."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x * np.float32(1 + 2**-23 * rng.choice([-1, 1], size=x.shape)), params
    )


def assert_equal_but_for_rounding(many, one, nudged, skip: str = "$^") -> None:
    """`many` and `one` are the loss, gradients and statistics that two programs give for the same
    parameters, `nudged` those of the second program for nudged parameters: what a rounding comes
    to in a model, which differs with model and processor."""
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
    for part in ("grads", "stats"):
        rounding = max(_errors(nudged[part], one[part], skip).values(), default=0)
        assert rounding < 1e-4
        for name, error in _errors(many[part], one[part], skip).items():
            assert error <= 4 * rounding, (part, name)


def _errors(found, expected, skip: str) -> dict[str, float]:
    """Norms of differences by name, relative to the norm expected, or to a hundredth of the
    largest norm where an array is smaller than that."""
    found, expected = tree.named(found), tree.named(expected)
    floor = 1e-2 * max(map(np.linalg.norm, expected.values()), default=0)
    return {
        name: float(np.linalg.norm(found[name] - a) / max(np.linalg.norm(a), floor))
        for name, a in expected.items()
        if not re.fullmatch(skip, name)
    }


def one_device_mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))


def on_host(arrays):
    return jax.tree.map(np.asarray, meshes.to_host(arrays))
