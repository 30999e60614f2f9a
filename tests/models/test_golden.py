"""Small encoders against what torch and transformers gave (scripts/make_golden.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from medsyn_jax.models.bert import Bert
from medsyn_jax.models.layers import split
from medsyn_jax.models.resnet import ResNet
from medsyn_jax.models.weights import convert

PATH = Path(__file__).resolve().parents[1] / "golden" / "encoders.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as file:
        return dict(file)


def loaded(golden, name, make, layout, folder):
    """Our model with the weights that stand in the golden file."""
    prefix = f"{name}/weights/"
    tensors = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "w.safetensors")
    structure, params, stats = split(nnx.eval_shape(make))
    params, stats = convert.load(folder / "w.safetensors", layout, params, stats)
    return nnx.merge(structure, *jax.tree.map(jnp.asarray, (params, stats)))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet(golden, block, tmp_path):
    def make():
        return ResNet((1, 2, 1, 1), 4, block, rngs=nnx.Rngs(0))

    model = loaded(golden, block, make, "torchvision", tmp_path)
    with jax.default_matmul_precision("highest"):
        features = model(jnp.asarray(golden["images"]), False)
    for name in ("layer3", "layer4", "pooled"):
        expected = golden[f"{block}/{name}"]
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(getattr(features, name), expected, atol=atol, rtol=1e-4)


def test_bert_with_padding_and_a_report_of_one_token(golden, tmp_path):
    def make():
        return Bert(30, 16, 2, 2, 32, 12, rngs=nnx.Rngs(0))

    model = loaded(golden, "bert", make, "hf_bert", tmp_path)
    mask = golden["mask"]
    with jax.default_matmul_precision("highest"):
        states = model(jnp.asarray(golden["ids"]), jnp.asarray(mask))
    for ours, theirs in zip(states, golden["bert/states"], strict=True):
        np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], atol=2e-5, rtol=1e-4)
    # Their pooler, which is not ours, over our last state of [CLS].
    pooler = {k: golden[f"bert/weights/pooler.dense.{k}"] for k in ("weight", "bias")}
    pooled = np.tanh(np.asarray(states[-1][:, 0]) @ pooler["weight"].T + pooler["bias"])
    np.testing.assert_allclose(pooled, golden["bert/pooled"], atol=2e-5, rtol=1e-4)
