"""Time one training step (forward, backward, AdamW) of the same model in torch and here, in turns.

    python -m scripts.bench_step --model resnet50 --batch 8 --repeats 7
    python -m scripts.bench_step --model bert --batch 8 --repeats 7
    python -m scripts.bench_step --model gloria --batch 48 --repeats 3
    python -m scripts.bench_step --model mgca --batch 72 --repeats 3

`resnet50` and `bert` are encoders alone. `convirt`, `gloria` and `mgca` are whole methods as their
authors train them: ResNet-50, twelve or six layers of BERT, heads and losses (`torch_methods`).
Both sides use all cores. Encoders run in one process and take turns, so that other programs on the
machine affect both sides alike; methods run one after the other, since two do not fit in the memory
of a small machine. Prints a JSON line for each side, and one with the ratio of their speeds (above
1: we are faster) by the medians and by the fastest steps. torch runs as fast as it can: channels
last, fused AdamW, SDPA.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import BertConfig, BertModel

from medsyn_jax.models.bert import Bert
from medsyn_jax.models.resnet import ResNet
from scripts import torch_methods
from scripts.programs import (
    METHODS,
    filled,
    method_batch,
    method_config,
    method_forward,
    method_model,
    training_step,
)

TOKENS = 112


def our_step(model: nnx.Module, forward: Callable, batch: dict) -> Callable:
    """The package's own training step, jitted with donation; each call waits for the result."""
    step, state = training_step(model, forward)
    compiled = jax.jit(step, donate_argnums=0)
    state = filled({k: state[k] for k in ("step", "opt")}) | {
        k: state[k] for k in ("params", "stats")
    }

    def call() -> float:
        nonlocal state
        state, loss = jax.block_until_ready(compiled(state, batch, 0))
        return float(loss)

    return call


def resnet_pair(args: argparse.Namespace) -> tuple[Callable, Callable]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((args.batch, args.size, args.size, 3), np.float32)
    probe = rng.standard_normal((args.batch, 2048), np.float32)
    nchw = torch.from_numpy(images).permute(0, 3, 1, 2).to(memory_format=torch.channels_last)
    module = torch_methods.torch_resnet.ResNet().to(memory_format=torch.channels_last)
    theirs = torch_methods.step_of(
        module, lambda m, x, p: (m(x)[2] * p).mean(), (nchw, torch.from_numpy(probe)), args.bf16
    )
    model = ResNet((3, 4, 6, 3), dtype=args.dtype, rngs=nnx.Rngs(0))
    batch = {"image": jnp.asarray(images), "probe": jnp.asarray(probe)}
    ours = our_step(model, lambda m, b, _: (m(b["image"], True).pooled * b["probe"]).mean(), batch)
    return lambda: theirs, lambda: ours


def bert_pair(args: argparse.Namespace) -> tuple[Callable, Callable]:
    rng = np.random.default_rng(0)
    config = BertConfig(
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
        attn_implementation="sdpa",
    )
    ids = rng.integers(0, config.vocab_size, (args.batch, TOKENS))
    mask = np.arange(TOKENS)[None] < rng.integers(60, TOKENS + 1, args.batch)[:, None]
    probe = rng.standard_normal((args.batch, 768), np.float32)

    def forward(module, ids, mask, probe):
        return (module(ids, mask).last_hidden_state[:, 0] * probe).mean()

    inputs = (torch.from_numpy(ids), torch.from_numpy(mask).long(), torch.from_numpy(probe))
    module = BertModel(config, add_pooling_layer=False)
    theirs = torch_methods.step_of(module, forward, inputs, args.bf16)
    sizes = (config.vocab_size, 768, 12, 12, 3072, 512)
    model = Bert(*sizes, dropout=args.dropout, dtype=args.dtype, rngs=nnx.Rngs(0))
    batch = {"ids": jnp.asarray(ids, jnp.int32), "mask": jnp.asarray(mask), "probe": probe}

    def ours(network, batch, key):
        states = network(batch["ids"], batch["mask"], key if args.dropout else None)
        return (states[-1][:, 0] * batch["probe"]).mean()

    return lambda: theirs, lambda: our_step(model, ours, batch)


def method_pair(args: argparse.Namespace) -> tuple[Callable, Callable]:
    config = method_config(args.model, toy=False)
    batch = method_batch(config, args.batch)

    def theirs() -> Callable:
        return torch_methods.method_step(args.model, config, batch, bf16=args.bf16)

    def ours() -> Callable:
        model = method_model(config, nnx.Rngs(0), args.dtype)
        return our_step(model, method_forward(args.model, config), jax.device_put(batch))

    return theirs, ours


PAIRS = {"resnet50": resnet_pair, "bert": bert_pair, **dict.fromkeys(METHODS, method_pair)}


SIDES = ("torch", "medsyn_jax")


def timed(steps: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step; the sides take turns, and the first step of each is not counted."""
    seconds = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            time.sleep(0.3)  # the threads of the other side spin for a while before they sleep
            start = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def timed_apart(args: argparse.Namespace) -> dict[str, list[float]]:
    """Like `timed`, in two processes one after the other: two methods do not fit in memory."""
    seconds = {}
    for side in SIDES:
        command = [
            sys.executable,
            "-m",
            "scripts.bench_step",
            "--model",
            args.model,
            "--side",
            side,
        ]
        command += ["--batch", str(args.batch), "--repeats", str(args.repeats)]
        command += ["--bf16"] if args.bf16 else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        seconds |= json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(PAIRS), default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--dropout", type=float, default=0.1, help="rate of BERT, on both sides")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="bf16 compute (torch: autocast)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = jnp.bfloat16 if args.bf16 else jnp.float32
    torch.manual_seed(0)

    sides = dict(zip(SIDES, PAIRS[args.model](args), strict=True))
    if args.side:
        return print(json.dumps(timed({args.side: sides[args.side]()}, args.repeats)))
    if PAIRS[args.model] is method_pair:
        seconds = timed_apart(args)
    else:
        seconds = timed({name: make() for name, make in sides.items()}, args.repeats)
    what = {"model": args.model, "batch": args.batch, "dtype": jnp.dtype(args.dtype).name}
    for name, times in seconds.items():
        median = float(np.median(times))
        figures = {"median_s": round(median, 4), "min_s": round(min(times), 4)}
        print(json.dumps(what | {"side": name, **figures, "per_s": round(args.batch / median, 2)}))
    ratios = {
        "ratio_of_medians": np.median(seconds["torch"]) / np.median(seconds["medsyn_jax"]),
        "ratio_of_fastest": min(seconds["torch"]) / min(seconds["medsyn_jax"]),
    }
    print(json.dumps(what | {k: round(float(v), 3) for k, v in ratios.items()}))


if __name__ == "__main__":
    main()
