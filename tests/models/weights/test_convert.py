"""Weight files: what comes in goes out again, and whatever does not fit is refused by name."""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.models.bert import Bert
from medsyn_jax.models.layers import split
from medsyn_jax.models.resnet import ResNet
from medsyn_jax.models.vit import ViT
from medsyn_jax.models.weights import convert, layouts

RESNETS = ("torchvision", "timm", "hf_resnet")


@functools.cache
def small_resnet(block="bottleneck"):
    """Its shapes only: nothing is computed."""
    return nnx.eval_shape(lambda: ResNet((1, 2, 1, 1), 4, block, rngs=nnx.Rngs(0)))


@functools.cache
def small_bert():
    return nnx.eval_shape(lambda: Bert(11, 8, 2, 2, 12, 6, rngs=nnx.Rngs(0)))


@functools.cache
def small_vit():
    return nnx.eval_shape(lambda: ViT(8, 4, 6, 2, 2, 10, rngs=nnx.Rngs(0)))


def filled(model, seed=0):
    """The model's two trees with every leaf random, so that no two could be mistaken."""
    _, params, stats = split(model)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.random(x.shape, np.float32), (params, stats))


def blank(trees):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trees)


def assert_same(a, b):
    a, b = tree.named(a), tree.named(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)
        assert a[name].dtype == np.float32


@pytest.fixture(params=["torchvision", "timm", "hf_resnet", "hf_bert", "timm_vit", "hf_vit"])
def case(request):
    """A layout, and trees for it."""
    model = {"hf_bert": small_bert, "timm_vit": small_vit, "hf_vit": small_vit}
    return request.param, filled(model.get(request.param, small_resnet)())


@pytest.mark.parametrize("detect", [False, True])
def test_round_trip_is_exact(case, detect, tmp_path):
    layout, trees = case
    path = tmp_path / "new" / "model.safetensors"
    convert.save(path, layout, *trees)
    found = convert.load(path, "" if detect else layout, *blank(trees))
    assert_same(found, trees)
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_basic_blocks_round_trip(tmp_path):
    trees = filled(small_resnet("basic"))
    for layout in RESNETS:
        convert.save(tmp_path / "w.safetensors", layout, *trees)
        assert_same(convert.load(tmp_path / "w.safetensors", "", *blank(trees)), trees)


@pytest.mark.parametrize(
    ("depths", "block", "count"),
    [((2, 2, 2, 2), "basic", 20), ((3, 4, 6, 3), "basic", 36), ((3, 4, 6, 3), "bottleneck", 53)],
)
def test_full_size_keys(depths, block, count):
    """conv + 4 of its norm + its counter, for every convolution of the published networks."""
    params, stats = jax.eval_shape(lambda: split(ResNet(depths, block=block, rngs=nnx.Rngs(0)))[1:])
    names = tree.named(params) | tree.named(stats)
    for layout in ("torchvision", "hf_resnet"):
        plan = layouts.LAYOUTS[layout].plan(names)
        assert plan is not None
        assert len(plan) == 5 * count


def test_keys_and_axes_of_torchvision(tmp_path):
    params, stats = filled(small_resnet())
    convert.save(tmp_path / "w.safetensors", "torchvision", params, stats)
    file = load_file(tmp_path / "w.safetensors")
    kernel = params["stages"]["1"]["0"]["convs"]["1"]["conv"]["kernel"]
    np.testing.assert_array_equal(file["layer2.0.conv2.weight"], kernel.transpose(3, 2, 0, 1))
    var = stats["stages"]["3"]["0"]["shortcut"]["norm"]["var"]
    np.testing.assert_array_equal(file["layer4.0.downsample.1.running_var"], var)
    assert file["layer4.0.downsample.1.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(case, dtype, tmp_path):
    layout, trees = case
    path = tmp_path / "w.safetensors"
    convert.save(path, layout, *trees)
    half = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in load_file(path).items()}
    save_file(half, path)
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), trees)
    assert_same(convert.load(path, layout, *trees), expected)


def test_sharded_folder(case, tmp_path):
    layout, trees = case
    convert.save(tmp_path / "w.safetensors", layout, *trees)
    tensors = load_file(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").unlink()
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (key, value) in enumerate(sorted(tensors.items())):
        shards["ab"[i % 2] + ".safetensors"][key] = value
    for name, part in shards.items():
        save_file(part, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    where = {key: name for name, part in shards.items() for key in part}
    index.write_text(json.dumps({"weight_map": where}))
    assert_same(convert.load(tmp_path, "", *trees), trees)
    assert_same(convert.load(index, layout, *trees), trees)

    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    with pytest.raises(
        UserError, match=r"b\.safetensors: named in model\.safetensors\.index\.json"
    ):
        convert.load(tmp_path, "", *trees)
    save_file(shards["b.safetensors"] | {"stray": np.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors: .* stray"):
        convert.load(tmp_path, "", *trees)
    index.write_text("{")
    for text, says in (
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON: nested too deep"),
        ("[1]", "must hold one JSON object"),
        ('{"weight_map": ["a"]}', "not an index"),
        ('{"weight_map": {"a": 5}}', "not an index"),
        ('{"weight_map": {"a": "b\\u0000\\n"}}', r"b\\x00\\n': named in .* but not there"),
        (json.dumps({"weight_map": {"a": "b" * 5000}}), r"b\.\.\.: named in .* but not there"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=says) as e:
            convert.load(tmp_path, "", *trees)
        assert "\n" not in str(e.value)
        assert len(str(e.value)) < 500


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_bert_dialects(prefix, old_names, extras, tmp_path, caplog):
    """Bio_ClinicalBERT has the prefix and the heads of pre-training; old files gamma and beta."""
    trees, path = filled(small_bert()), tmp_path / "w.safetensors"
    convert.save(path, "hf_bert", *trees)
    tensors = {}
    for key, value in load_file(path).items():
        if old_names:
            key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
            key = key.replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[prefix + key] = value
    if extras:
        tensors[f"{prefix}embeddings.position_ids"] = np.arange(6)[None]
        tensors[f"{prefix}pooler.dense.weight"] = np.zeros((8, 8), np.float32)
        tensors["cls.predictions.bias"] = np.zeros(11, np.float32)
        tensors["cls.seq_relationship.weight"] = np.zeros((2, 8), np.float32)
    save_file(tensors, path)
    with caplog.at_level("INFO"):
        assert_same(convert.load(path, "", *trees), trees)
    assert ("cls.predictions.bias, cls.seq_relationship.weight" in caplog.text) == extras
    assert (f"{prefix}pooler.dense.weight" in caplog.text) == extras


def test_classifiers_are_left_out(tmp_path, caplog):
    trees, path = filled(small_resnet()), tmp_path / "w.safetensors"
    convert.save(path, "torchvision", *trees)
    save_file(load_file(path) | {"fc.weight": np.zeros((2, 128), np.float32)}, path)
    with caplog.at_level("INFO"):
        assert_same(convert.load(path, "", *trees), trees)
    assert "left out by name: fc.weight" in caplog.text
    convert.save(path, "hf_resnet", *trees)
    tensors = {f"resnet.{k}": v for k, v in load_file(path).items()}
    save_file(tensors | {"classifier.1.bias": np.zeros(2, np.float32)}, path)
    assert_same(convert.load(path, "", *trees), trees)


def as_timm(tensors):
    """What timm calls the tensors of a Hugging Face ViT, with query, key and value in one."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm": "norm",
    }
    found = {}
    for key, value in tensors.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        found[key] = value
    for key in [key for key in found if ".attention.attention.query." in key]:
        three = [found.pop(key.replace("query", x)) for x in ("query", "key", "value")]
        found[key.replace("attention.attention.query", "attn.qkv")] = np.concatenate(three)
    return found


def as_transformers_5(tensors):
    """The names of the modules of transformers 5, which its files do not have."""
    pairs = (("encoder.layer", "layers"), ("attention.output.dense", "attention.o_proj"))
    pairs += tuple((f"attention.{x}.", f"{x[0]}_proj.") for x in ("query", "key", "value"))
    pairs += (("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"))
    found = {}
    for key, value in tensors.items():
        for file, module in pairs:
            key = key.replace(file, module)
        found[key] = value
    return found


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    ("layout", "dialect", "prefix"),
    [
        ("timm_vit", as_timm, ""),
        ("hf_vit", dict, "vit."),
        ("hf_vit", as_transformers_5, ""),
        ("hf_vit", as_transformers_5, "vit."),
    ],
)
def test_vit_dialects(layout, dialect, prefix, extras, tmp_path, caplog):
    trees, path = filled(small_vit()), tmp_path / "w.safetensors"
    convert.save(path, "hf_vit", *trees)
    tensors = {prefix + k: v for k, v in dialect(load_file(path)).items()}
    heads = (
        ["head.weight"] if layout == "timm_vit" else ["classifier.bias", "vit.pooler.dense.bias"]
    )
    left = {key: np.zeros(3, np.float32) for key in heads} if extras else {}
    save_file(tensors | left, path)
    with caplog.at_level("INFO"):
        for name in ("", layout):
            assert_same(convert.load(path, name, *blank(trees)), trees)
    assert (f"left out by name: {', '.join(heads)}" in caplog.text) == extras


def test_a_shared_tensor_of_another_shape(tmp_path):
    trees, path = filled(small_vit()), tmp_path / "w.safetensors"
    convert.save(path, "timm_vit", *trees)
    save_file(load_file(path) | {"blocks.1.attn.qkv.bias": np.zeros(12, np.float32)}, path)
    says = r"3 misshapen: blocks\.1\.attn\.qkv\.bias \[12\] for layers/1/\w+/bias \[6\]"
    with pytest.raises(UserError, match=says):
        convert.load(path, "timm_vit", *trees)


@pytest.mark.parametrize(
    ("layout", "make"),
    [
        ("hf_bert", lambda n: Bert(11, 8, n, 2, 12, 6, rngs=nnx.Rngs(0))),
        ("timm_vit", lambda n: ViT(8, 4, 6, n, 2, 10, rngs=nnx.Rngs(0))),
        ("hf_vit", lambda n: ViT(8, 4, 6, n, 2, 10, rngs=nnx.Rngs(0))),
    ],
)
def test_the_first_layers_of_a_deeper_model(layout, make, tmp_path):
    """Only when asked for, and then every other key still has to fit."""
    deep, path, said = filled(nnx.eval_shape(lambda: make(12))), tmp_path / "w.safetensors", []
    convert.save(path, layout, *deep)
    wanted = filled(nnx.eval_shape(lambda: make(3)), seed=1)
    with pytest.raises(UserError, match=r"does not fit the model: \d+ extra: "):
        convert.load(path, layout, *wanted)
    found = convert.load(path, layout, *blank(wanted), layers=3, report=said.append)
    first = deep[0] | {"layers": {n: deep[0]["layers"][n] for n in "012"}}
    assert_same(found, (first, {}))
    assert said == [f"{path}: left out layers 3 to 11, counted from 0"]
    with pytest.raises(UserError, match=r"does not fit the model: \d+ missing: "):
        convert.load(path, layout, *wanted, layers=2)
    assert_same(convert.load(path, layout, *deep, layers=12, report=said.append), deep)
    assert len(said) == 1
    save_file(load_file(path) | {"stray": np.zeros(1, np.float32)}, path)
    with pytest.raises(UserError, match=r"does not fit the model: 1 extra: stray$"):
        convert.load(path, layout, *wanted, layers=3)


def edited(path, layout, trees, edit):
    convert.save(path, layout, *trees)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("layer1.0.bn1.bias"), "1 missing: layer1.0.bn1.bias"),
        (lambda t: t.update(stray=np.zeros(3, np.float32)), "1 extra: stray"),
        (lambda t: t.update({"stray.num_batches_tracked": np.array(1)}), "1 extra: stray"),
        (
            lambda t: t.update({"bn1.bias": np.zeros(5, np.float32)}),
            r"1 misshapen: bn1.bias \[5\] for stem/norm/bias \[4\]",
        ),
        (
            lambda t: t.update({"bn1.bias": np.zeros((4, 1), np.float32)}),
            r"1 misshapen: bn1.bias \[4, 1\] for stem/norm/bias \[4\]",
        ),
        (lambda t: t.update({"conv1.weight": np.zeros((4,), np.float32)}), "1 misshapen: conv1"),
        (lambda t: t.update({"bn1.bias": np.zeros(4, np.int32)}), "1 neither .* bn1.bias int32"),
        (lambda t: t.clear(), r"\d+ missing: bn1.bias, bn1.running_mean, .* \.\.\."),
    ],
)
def test_misfits_are_listed(edit, says, tmp_path):
    trees = filled(small_resnet())
    path = edited(tmp_path / "w.safetensors", "torchvision", trees, edit)
    with pytest.raises(UserError, match=rf"^weights: {path}: does not fit the model: {says}") as e:
        convert.load(path, "torchvision", *trees)
    assert "\n" not in str(e.value)


def test_another_model_and_unknown_layout(tmp_path):
    path = tmp_path / "w.safetensors"
    convert.save(path, "torchvision", *filled(small_resnet()))
    with pytest.raises(UserError, match=r"does not fit the model: .* missing"):
        convert.load(path, "", *filled(small_bert()))
    with pytest.raises(UserError, match="layout hf_bert does not fit this model"):
        convert.load(path, "hf_bert", *filled(small_resnet()))
    with pytest.raises(UserError, match="choose one of torchvision, timm"):
        convert.load(path, "keras", *filled(small_resnet()))
    with pytest.raises(UserError, match="has no names for this model"):
        convert.save(path, "hf_bert", *filled(small_resnet()))
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        convert.save(tmp_path / "w.pth", "torchvision", *filled(small_resnet()))


@pytest.mark.parametrize("name", ["w.pth", "pytorch_model.bin", "w.pt", "sly.safetensors"])
@pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x80\x02}q\x00", b"\x80\x04\x95"])
def test_pickles_are_refused(name, head, tmp_path):
    path = tmp_path / name
    path.write_bytes(head + bytes(200))
    out = path.with_suffix(".safetensors")
    told = rf"^weights: {path}: a pickle.*to_safetensors\.py {path} {out}"
    with pytest.raises(UserError, match=told):
        convert.load(path, "", *filled(small_resnet()))
    if name.endswith(".bin"):
        with pytest.raises(UserError, match=told):
            convert.load(tmp_path, "", *filled(small_resnet()))


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_cut_short(keep, tmp_path):
    trees, path = filled(small_resnet()), tmp_path / "w.safetensors"
    convert.save(path, "torchvision", *trees)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"^weights: {path}: not a whole safetensors file"):
        convert.load(path, "", *trees)


def test_nothing_there(tmp_path):
    trees = filled(small_resnet())
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        convert.load(tmp_path / "nowhere", "", *trees)
    with pytest.raises(UserError, match=r"no \.safetensors file in this folder"):
        convert.load(tmp_path, "", *trees)
    for name in ("a", "b"):
        convert.save(tmp_path / f"{name}.safetensors", "timm", *trees)
    with pytest.raises(UserError, match=r"holds 2 \.safetensors files, name one"):
        convert.load(tmp_path, "", *trees)


def test_unwritable_leaves_what_was_there(tmp_path, monkeypatch):
    trees, path = filled(small_resnet()), tmp_path / "w.safetensors"
    convert.save(path, "timm", *trees)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(UserError, match=rf"disk full: {path}: free some space"):
        convert.save(path, "timm", *trees)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_loaded_weights_run(tmp_path):
    """The trees that come back are what `nnx.merge` takes."""
    trees = filled(small_resnet())
    convert.save(tmp_path / "w.safetensors", "timm", *trees)
    again = convert.load(tmp_path / "w.safetensors", "timm", *blank(trees))
    x = jnp.ones((1, 32, 32, 3))
    structure = split(small_resnet())[0]
    run = jax.jit(lambda p, s: nnx.merge(structure, p, s, copy=True)(x, False).pooled)
    np.testing.assert_array_equal(run(*again), run(*trees))


def extras(*names):
    return {name: np.zeros(3, np.float32) for name in names}


BERT_HEADS = extras("cls.predictions.bias", "cls_projection_head.dense_to_hidden.weight")
MAE_TIMM = extras("mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight")
MAE_HF = extras("decoder.mask_token", "decoder.decoder_layers.0.layernorm_before.weight")
MOCO = extras("module.momentum_encoder.cls_token", "module.predictor.0.weight")


@pytest.mark.parametrize(
    ("layout", "prefix", "beside"),
    [
        ("hf_bert", "bert.", BERT_HEADS),
        ("hf_bert", "module.bert.", extras("module.linear_heads.0.weight")),  # CheXbert
        ("hf_bert", "", extras("classifier.weight", "classifier.dense.bias", "qa_outputs.bias")),
        ("hf_bert", "model.text_encoder.", extras("logit_scale", "text_projection")),
        ("timm_vit", "", MAE_TIMM),
        ("timm_vit", "model.", extras("model.decoder_norm.bias", "model.mask_token")),
        ("timm_vit", "backbone.", extras("head.mlp.0.weight", "head.last_layer.weight_g")),  # DINO
        ("timm_vit", "module.base_encoder.", MOCO | extras("module.base_encoder.head.0.weight")),
        ("hf_vit", "vit.", MAE_HF),
        ("hf_bert", "bert.", extras("mlm_head.bias", "nsp.weight", "predictions.bias")),
        ("timm_vit", "encoder.", extras("decoder.0.weight", "encoder.mask_token")),  # SimMIM
        ("timm_vit", "online_encoder.", extras("predictor.0.bias", "target_encoder.cls_token")),
        ("timm_vit", "classifier.", extras("head_dist.bias", "prototypes.weight")),
        ("timm_vit", "momentum_encoder.", extras("momentum_projector.0.weight")),
        ("torchvision", "module.encoder_q.", extras("module.encoder_k.bn1.bias", "module.queue")),
        ("hf_resnet", "_orig_mod.resnet.", extras("_orig_mod.classifier.1.bias")),
    ],
)
def test_prefixes_and_what_stands_beside_an_encoder(layout, prefix, beside, tmp_path):
    """Under any one prefix the values are the same; heads and decoders are left out and named."""
    make = {"hf_bert": small_bert, "timm_vit": small_vit}
    trees = filled((make | {"hf_vit": small_vit}).get(layout, small_resnet)())
    path, said = tmp_path / "w.safetensors", []
    convert.save(path, layout, *trees)
    save_file({prefix + key: value for key, value in load_file(path).items()} | beside, path)
    assert_same(convert.load(path, "", *blank(trees), report=said.append), trees)
    assert said == [f"{path}: left out by name: {', '.join(sorted(beside))}"]
    save_file(load_file(path) | extras(f"{prefix}stray.weight"), path)
    with pytest.raises(UserError, match=rf"does not fit the model: 1 extra: {prefix}stray\.weight"):
        convert.load(path, "", *trees)


def test_many_keys_that_are_left_out_are_named_by_their_families(tmp_path):
    trees, path, said = filled(small_vit()), tmp_path / "w.safetensors", []
    convert.save(path, "timm_vit", *trees)
    decoder = extras("mask_token", *(f"decoder_blocks.{n}.norm1.bias" for n in range(20)))
    save_file(load_file(path) | decoder, path)
    assert_same(convert.load(path, "", *blank(trees), report=said.append), trees)
    assert said == [f"{path}: left out by name: decoder_* (20), mask_* (1)"]


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(odd, tmp_path):
    trees, path = filled(small_vit()), tmp_path / "w.safetensors"
    edit = {"norm.bias": np.full(6, odd, np.float16)}
    edited(path, "timm_vit", trees, lambda tensors: tensors.update(edit))
    with pytest.raises(UserError, match=rf"^weights: {path}: NaN or infinity in 1: norm.bias"):
        convert.load(path, "", *trees)


def test_two_encoders_of_one_file_are_refused(tmp_path):
    trees, path = filled(small_vit()), tmp_path / "w.safetensors"
    convert.save(path, "timm_vit", *trees)
    file = load_file(path)
    save_file({f"{name}.{k}": v for name in ("student", "other") for k, v in file.items()}, path)
    with pytest.raises(UserError, match=rf"does not fit the model: {len(file)} extra: student\."):
        convert.load(path, "", *trees)


def test_a_roberta_is_no_bert(tmp_path):
    """Its keys and shapes are BERT's, its positions count from 2."""
    trees, path = filled(small_bert()), tmp_path / "w.safetensors"
    convert.save(path, "hf_bert", *trees)
    save_file({f"roberta.{key}": value for key, value in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"w\.safetensors: roberta\.\*: a RoBERTa counts"):
        convert.load(path, "", *trees)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"])
def test_types_that_are_not_read_are_one_line(dtype, tmp_path):
    path = tmp_path / "w.safetensors"
    size = {"F4": 4, "C64": 64}.get(dtype, 8)
    head = {"x\n" + "y" * 500: {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(UserError, match=rf"w\.safetensors: .* of type {dtype}, .* float32") as e:
        convert.load(path, "", *filled(small_vit()))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 400


def converted(state, tmp_path, **options):
    """What the script makes of a checkpoint: its exit status, tensors or None, and last words."""
    torch = pytest.importorskip("torch")
    source, target = tmp_path / "a.pth", tmp_path / "a.safetensors"
    target.unlink(missing_ok=True)
    if isinstance(state, bytes):
        source.write_bytes(state)
    else:
        torch.save(state, source, **options)
    command = [sys.executable, "scripts/to_safetensors.py", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    assert "\n" not in said
    return done.returncode, load_file(target) if target.exists() else None, said


@pytest.mark.parity
def test_checkpoints_of_trainers_become_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    x, weight = torch.arange(6.0).reshape(2, 3), {"module.x": torch.ones(2)}
    namespace = argparse.Namespace(lr=1, at=Path("here"), best=np.float64(3))
    for state, names, of in (
        (weight, {"module.x"}, ""),
        ({"model": weight, "args": namespace, "scaler": {"s": 1.0}}, {"module.x"}, "model"),
        ({"epoch": 7, "model_state_dict": weight, "rng": np.zeros(3)}, {"module.x"}, "model_state"),
        ({"student": {"y": x}, "teacher": weight}, {"module.x"}, "teacher"),
        ({"state_dict": {"model": weight}, "loss": x}, {"module.x"}, "state_dict/model"),
        ({"anything": weight, "optimizer": {"state": {0: {"m": x}}}}, {"module.x"}, "anything"),
        ({"state_dict": {"module.x": x[0], "tied": x[0], "n": None}}, {"module.x", "tied"}, ""),
        ({"best": x.sum(), "metrics": {"loss": x.sum()}, "mine": weight}, {"module.x"}, "mine"),
        ({"state_dict_ema": weight, "optimizer": {"m": x}}, {"module.x"}, "state_dict_ema"),
    ):
        for options in ({}, {"_use_new_zipfile_serialization": False}):
            status, tensors, said = converted(state, tmp_path, **options)
            assert status == 0, said
            assert tensors.keys() == names
            assert f"{len(names)} tensors{f' of {of}' if of else ''}" in said
            assert tensors["module.x"].dtype == np.float32
            expected = np.arange(3.0) if "tied" in names else np.ones(2)
            for value in tensors.values():
                np.testing.assert_array_equal(value, expected)
    status, tensors, _ = converted({"a": x.bfloat16(), "b": x.to(torch.float8_e4m3fn)}, tmp_path)
    assert (tensors["a"].dtype.name, tensors["b"].dtype.name) == ("bfloat16", "float32")
    np.testing.assert_array_equal(tensors["b"], x)


class Sly:
    def __reduce__(self):
        return os.system, ("touch sly",)


@pytest.mark.parity
def test_what_is_no_checkpoint_is_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    for state, says in (
        (b"", "EOFError"),
        (b"PK\x03\x04" + bytes(50), "failed"),
        (b"hello world", "KeyError: 101"),
        ({"model": {"x": torch.ones(2)}, "sly": Sly()}, "cannot read it without running its code"),
        (torch.nn.Linear(2, 2), "holds no dictionary of tensors"),
        ({"a": {"x": torch.ones(2)}, "b": {"x": torch.ones(2)}}, "several models: a/, b/"),
        ({"a": {"x": torch.ones(2)}, "x": torch.ones(2)}, "models: a/, the tensors beside"),
        ({"state_dict": {}, "callbacks": {"best": torch.ones(2)}}, "no dictionary of tensors"),
        ({"optimizer": {"state": {0: {"m": torch.ones(2)}}}}, r"no dictionary .*\(optimizer\)"),
    ):
        status, tensors, said = converted(state, tmp_path)
        assert (status, tensors) == (1, None)
        assert re.search(rf"^error: {tmp_path}/a\.pth: .*{says}", said)
    assert not Path("sly").exists()
