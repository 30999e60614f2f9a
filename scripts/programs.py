"""The JAX programs that scripts/on_gpu.py runs on a GPU, or compiles for an absent one.

A program is a function and its arguments, whose leaves are NumPy arrays, or shapes that `filled`
fills. Importing this module needs only JAX, Flax, Optax, transformers and NumPy: other packages
that medsyn_jax imports, for data, are replaced by empty modules if they are missing.
"""

import functools
import importlib.abc
import importlib.machinery
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ABSENT = ("jaxtyping", "ml_collections", "grain", "tensorflow_datasets", "array_record", "PIL")
ABSENT += ("pydicom", "pylibjpeg", "tensorboardX", "absl", "rich", "orbax", "safetensors")


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class Anything(metaclass=_Anything):
    """Stands for any member of a missing module: can be named and called, and does nothing."""


class ConfigDict(dict):
    """The part of ml_collections' ConfigDict that the files in configs/ need."""

    def __init__(self, values: Any = ()):
        super().__init__()
        self.update(values)

    def update(self, values: Any) -> None:
        for name, value in dict(values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        plain = isinstance(value, dict) and not isinstance(value, ConfigDict)
        super().__setitem__(name, ConfigDict(value) if plain else value)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = __setitem__

    def to_dict(self) -> dict:
        return {k: v.to_dict() if isinstance(v, ConfigDict) else v for k, v in self.items()}


class StandIn(ModuleType):
    __path__: tuple[str, ...] = ()
    ConfigDict = ConfigDict

    def __getattr__(self, name: str) -> Any:
        return getattr(Anything, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: gives an empty module for a missing package."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        absent = name.partition(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def create_module(self, spec: Any) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())
sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import convirt, generate, gloria, mgca  # noqa: E402
from medsyn_jax.core import optim  # noqa: E402
from medsyn_jax.diffusion import generator, sampler, schedule  # noqa: E402
from medsyn_jax.models.diffusion import pipeline  # noqa: E402
from medsyn_jax.models.layers import split, statistics  # noqa: E402
from medsyn_jax.models.towers import (  # noqa: E402
    Embeddings,
    Local,
    PairEncoder,
    image_encoder,
    text_encoder,
)
from medsyn_jax.objectives.gloria import local_loss  # noqa: E402
from medsyn_jax.tasks.pretrain import METHODS  # noqa: E402
from medsyn_jax.train.step import make_step  # noqa: E402

VOCABULARY = 28996
TOKENS = 77
UNET = {"cross_attention_dim": 768, "sample_size": 64}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}
TOY_UNET = UNET | {
    "block_out_channels": (16, 16, 32, 32),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
TOY_VAE = VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
OPTIMIZER = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.05}


class Program(NamedTuple):
    """f is called as f(*args). If `donated`, its first result replaces its first argument in the
    next call, like the state of a training."""

    f: Callable
    args: tuple
    donated: bool = False


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


@functools.cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(2**22, np.float32)


def filled(args: Any) -> Any:
    """The arguments with arrays in place of shapes: zeros for counters, biases, means and optimizer
    state, ones for scales and variances, else normal numbers scaled so that a matrix or a kernel
    preserves the magnitude of its input."""

    def fill(path: tuple, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        name = jax.tree_util.keystr(path)
        if "opt" in name or leaf.dtype == jnp.int32:
            return np.zeros(leaf.shape, leaf.dtype)
        if name.endswith(("['scale']", "['var']")):
            return np.ones(leaf.shape, leaf.dtype)
        if name.endswith(("['bias']", "['mean']")):
            return np.zeros(leaf.shape, leaf.dtype)
        spread = math.sqrt(max(math.prod(leaf.shape[:-1]), 1))
        return np.resize((_noise() / np.float32(spread)).astype(leaf.dtype), leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, args)


def diffusion(toy: bool, dtype: Any = jnp.bfloat16) -> pipeline.Pipeline:
    """SD 1.5 without a text encoder; parameters are shapes, matrices in `dtype`."""

    def kept(p: Any) -> jax.ShapeDtypeStruct:
        """The parameter as a Generator keeps it."""
        return shape(*p.shape, dtype=dtype if p.ndim > 1 else jnp.float32)

    parts = {}
    configs = {"unet": TOY_UNET, "vae": TOY_VAE} if toy else {"unet": UNET, "vae": VAE}
    for name, config in configs.items():
        empty = pipeline.part(name, config, {})
        shapes = split(nnx.eval_shape(lambda make=empty.make: make(nnx.Rngs(0))))[1]
        parts[name] = pipeline.Part(config, empty.make, jax.tree.map(kept, shapes))
    return pipeline.Pipeline(parts, SCHEDULER, Path())


def guided_step(batch: int, toy: bool, dtype: Any = jnp.bfloat16) -> Program:
    """The U-Net on `batch` latents with and without their text, then guidance."""
    parts = diffusion(toy, dtype).parts
    unet, side = pipeline.module_of(parts["unet"], dtype), 8 if toy else 64

    def step(params: Any, x: jax.Array, t: jax.Array, text: jax.Array) -> jax.Array:
        without, with_text = jnp.split(unet(params)(x, t, text).astype(jnp.float32), 2)
        return without + 2 * (with_text - without)

    width = parts["unet"].config["cross_attention_dim"]
    x, t = shape(2 * batch, side, side, 4), np.full(2 * batch, 500, np.float32)
    text = shape(2 * batch, TOKENS, width, dtype=dtype)
    return Program(step, (parts["unet"].params, x, t, text))


def image(batch: int, toy: bool, default: bool) -> Program:
    """Whole images by the default of configs/generate.py; without `default` by as many steps of the
    same sampler, each guided and with all layers."""
    parts, settings = diffusion(toy), generate.get_config().sampler
    every = {} if default else {"interval": (), "cache_every": 1}
    sampling = generator.Sampling(**{**settings.to_dict(), **every})
    table = schedule.make_table(sampling.name, SCHEDULER, sampling.steps)
    size, width = 64 if toy else 512, parts.parts["unet"].config["cross_attention_dim"]
    draw = generator._draw_fn(parts, sampling, table, size, batch, jnp.bfloat16)

    def images(params: Any, seed: jax.Array, *inputs: jax.Array) -> tuple:
        return draw(params, jax.random.key(seed), *inputs)

    params = {name: part.params for name, part in parts.parts.items()}
    empty, contexts = (shape(n, TOKENS, width, dtype=jnp.bfloat16) for n in (1, batch))
    return Program(images, (params, shape(dtype=jnp.int32), empty, np.arange(batch), contexts))


def method_config(name: str, toy: bool) -> Any:
    """The paper's settings without weight files; toy: with small networks."""
    config = {"convirt": convirt, "gloria": gloria, "mgca": mgca}[name].get_config("paper")
    if toy:
        config.image.update({"depths": (1, 1, 1, 1), "width": 8})
        config.text.update({"width": 32, "layers": 4, "heads": 2, "mlp_width": 64})
        config.heads.update({"hidden": 32, "width": 32})
        config.augment.size = config.image.upsample = 64
        config.data.update({"batch_size": 4, "tokens": 24})
    return config


def method_batch(config: Any, batch: int) -> dict[str, np.ndarray]:
    """Random images and token ids; reports fill half to all of the tokens."""
    rng, tokens = np.random.default_rng(0), config.data.tokens
    side = config.image.upsample or config.augment.size
    images = rng.standard_normal((batch, side, side, 3), np.float32)
    ids = rng.integers(0, VOCABULARY, (batch, tokens))
    mask = np.arange(tokens)[None] < rng.integers(tokens // 2, tokens + 1, batch)[:, None]
    new = rng.random(ids.shape) < 0.7  # the others continue the previous word
    words = np.where(mask, new.cumsum(1) - new[:, :1], -1)
    arrays = {"image": images, "ids": ids.astype(np.int32), "mask": mask}
    return arrays | {"words": words.astype(np.int32)}


def method_model(config: Any, rngs: nnx.Rngs, dtype: Any) -> PairEncoder:
    parts = (config[part].to_dict() for part in ("image", "text", "heads"))
    return PairEncoder(*parts, VOCABULARY, dtype=dtype, rngs=rngs)


def method_forward(name: str, config: Any) -> Callable:
    """forward(network, batch, key) -> the method's loss."""
    loss, settings = METHODS[name].loss, config.loss.to_dict()

    def forward(network: PairEncoder, batch: dict, key: jax.Array) -> jax.Array:
        texts = batch["ids"], batch["mask"], batch["words"] if config.heads.local else None
        return loss(network(batch["image"], *texts, train=True, key=key), None, **settings)[0]

    return forward


def training_step(model: nnx.Module, forward: Callable) -> tuple[Callable, dict]:
    """The package's own step, step(state, batch, seed) -> (state, loss), and its first state."""
    structure, params, stats = split(model)
    tx = optim.adamw(params, lambda _: 1e-5, **OPTIMIZER)

    def loss_fn(params: Any, stats: Any, batch: dict, key: jax.Array) -> tuple:
        network = nnx.merge(structure, params, stats, copy=True)
        loss = forward(network, batch, key)
        return loss, (statistics(network), {})

    step = make_step(loss_fn, tx)

    def seeded(state: dict, batch: dict, seed: jax.Array) -> tuple:
        state, metrics = step(state, batch, jax.random.key(seed))
        return state, metrics["loss"]

    opt = jax.eval_shape(tx.init, params)
    state = {"step": shape(dtype=jnp.int32), "params": params, "stats": stats, "opt": opt}
    return seeded, state


def method(name: str, toy: bool, dtype: Any = jnp.bfloat16, **settings: Any) -> Program:
    """A training step at the paper's batch size. settings: replace those of the loss."""
    config = method_config(name, toy)
    config.loss.update(settings)
    model = nnx.eval_shape(lambda: method_model(config, nnx.Rngs(0), dtype))
    step, state = training_step(model, method_forward(name, config))
    batch = method_batch(config, config.data.batch_size)
    return Program(step, (state, batch, shape(dtype=jnp.int32)), donated=True)


REGIONS, WORDS, WIDTH = 361, 97, 768


def local(batch: int, toy: bool) -> Program:
    """GLoRIA's local loss and its gradient in bf16, for reports that fill all words."""
    regions, words, width = (9, 6, 16) if toy else (REGIONS, WORDS, WIDTH)
    step = jax.value_and_grad(lambda *args: local_loss(*args)[0], (0, 1))
    inputs = (shape(batch, n, width, dtype=jnp.bfloat16) for n in (regions, words))
    return Program(step, (*inputs, np.ones((batch, words), bool)))


def local_tflop(batch: int, toy: bool = False) -> float:
    """TFLOP of the products that the loss and its gradient need, without recomputation."""
    r, w, d = (9, 6, 16) if toy else (REGIONS, WORDS, WIDTH)
    return batch**2 * (6 * r * w * d + 4 * r * r * w) / 1e12


def tflop(f: Callable, *args: Any) -> float:
    """TFLOP as lowered for a GPU; the CPU's attention has loops, whose bodies count only once."""
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.cost_analysis()["flops"] / 1e12


def image_tflop(unet_config: dict, vae_config: dict, side: int = 64) -> dict[str, float]:
    """TFLOP of an image by 75 guided steps of PNDM, by the default of configs/generate.py and by as
    many steps, each guided and with all layers, and TFLOP of the networks; in float32, where no
    kernel hides FLOPs."""
    modules, shapes = {}, {}
    for name, setting in (("unet", unet_config), ("vae", vae_config)):
        make = pipeline.part(name, setting, {}).make
        structure, shapes[name], _ = split(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
        modules[name] = functools.partial(nnx.merge, structure)

    def unet(params: Any) -> Any:
        return modules["unet"](params, {}, copy=True)

    x, width = shape(2, side, side, 4), unet_config["cross_attention_dim"]
    inputs = (shapes["unet"], x, shape(2), shape(2, TOKENS, width))
    deep = jax.eval_shape(lambda p, *a: unet(p).full(*a)[1], *inputs)
    decode = tflop(lambda p, x: modules["vae"](p, {}, copy=True).decode(x), shapes["vae"], x)
    cost = {
        "full": tflop(lambda p, *a: unet(p)(*a), *inputs) / 2,
        "shallow": tflop(lambda p, *a: unet(p).shallow(*a), *inputs, deep) / 2,
        "decode": decode / 2,
    }
    chosen = generate.get_config().sampler
    rows = {"pndm 75": generate.get_config("paper").sampler, "default": chosen}
    for row, sampling in rows.items():
        table = schedule.make_table(sampling.name, SCHEDULER, sampling.steps)
        guided, full = sampler.plan(
            table.steps.sigma,
            guidance=sampling.guidance,
            interval=tuple(sampling.interval) or (0.0, math.inf),
            cache_every=sampling.cache_every,
        )
        each = np.where(np.asarray(full), cost["full"], cost["shallow"])
        cost[row] = float(((1 + np.asarray(guided)) * each).sum()) + cost["decode"]
    cost["all guided"] = 2 * chosen.steps * cost["full"] + cost["decode"]
    return cost | {"share": cost["default"] / cost["pndm 75"]}


def _slopes(f: Callable, params: Any, *inputs: Any) -> tuple[jax.Array, jax.Array]:
    """Outputs of f(params, *inputs) and the gradient of their weighted mean, as two vectors."""

    def flat(tree: Any) -> jax.Array:
        return jnp.concatenate([x.astype(jnp.float32).ravel() for x in jax.tree.leaves(tree)])

    def total(params: Any) -> tuple[jax.Array, jax.Array]:
        out = flat(f(params, *inputs))
        return (out * jnp.cos(jnp.arange(out.size))).mean(), out

    grads, out = jax.grad(total, has_aux=True)(params)
    return out, flat(grads)


def parity_cases() -> dict[str, tuple[Callable, tuple]]:
    """Small networks and losses: name -> (make, arguments). make(dtype) is a function of the
    arguments; it returns two vectors, outputs and gradient."""
    rng = np.random.default_rng(1)

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, np.float32)

    def network(make: Callable, call: Callable, *inputs: np.ndarray) -> tuple[Callable, tuple]:
        def of(dtype: Any) -> Callable:
            structure = split(nnx.eval_shape(lambda: make(nnx.Rngs(0), dtype)))[0]

            def f(params: Any, stats: Any, *inputs: jax.Array) -> Any:
                return call(nnx.merge(structure, params, stats, copy=True), *inputs)

            return lambda params, stats, *x: _slopes(lambda p: f(p, stats, *x), params)

        shapes = split(nnx.eval_shape(lambda: make(nnx.Rngs(0), jnp.float32)))[1:]
        return of, (*filled(shapes), *inputs)

    def loss(name: str) -> tuple[Callable, tuple]:
        settings, b, w = method_config(name, True).loss.to_dict(), 6, 9
        arrays = {"image": normal(b, 32), "text": normal(b, 32), "prototypes": normal(20, 32)}
        arrays |= {"regions": normal(b, 25, 32) / 2, "words": normal(b, w, 32) / 2}
        looks = jax.nn.softmax(normal(b, 2, w))
        counts = rng.integers(2, w - 2, b).astype(np.int32)

        def of(dtype: Any) -> Callable:
            def f(arrays: dict, counts: jax.Array, looks: jax.Array) -> jax.Array:
                x = {k: v.astype(dtype) for k, v in arrays.items()}
                local_parts = Local(x["regions"], x["words"], counts, looks, None)
                e = Embeddings(x["image"], x["text"], local_parts, x["prototypes"])
                return METHODS[name].loss(e, None, **settings)[0]

            return lambda arrays, *more: _slopes(f, arrays, *more)

        return of, (arrays, counts, np.asarray(looks))

    config = method_config("mgca", True)
    vit = {"kind": "vit", "size": 32, "patch": 8, "width": 32, "layers": 2, "heads": 4}
    vit |= {"mlp_width": 64, "channels": 3, "eps": 1e-6, "remat": False}
    images = {settings["kind"]: settings for settings in (config.image.to_dict(), vit)}
    cases = {
        kind: network(
            lambda rngs, dtype, s=settings: image_encoder(s, dtype, rngs),
            lambda net, x: net(x, True),
            normal(4, 32, 32, 3),
        )
        for kind, settings in images.items()
    }
    cases["bert"] = network(
        lambda rngs, dtype: text_encoder(config.text.to_dict(), 100, dtype, rngs),
        lambda net, ids, mask: net(ids, mask, None)[-1],
        rng.integers(0, 100, (4, 24)).astype(np.int32),
        np.arange(24)[None] < rng.integers(12, 25, 4)[:, None],
    )
    part = pipeline.part("unet", TOY_UNET, {})
    cases["unet"] = network(
        lambda rngs, dtype: part.make(rngs, dtype=dtype),
        lambda net, x, t, text: net(x, t, text),
        *(normal(2, 32, 32, 4), np.array([10, 900], np.int32), normal(2, TOKENS, 16)),
    )
    return cases | {f"loss {name}": loss(name) for name in METHODS}
