"""Encoders of a run in the folders of other libraries: `scripts/export_encoders.py`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import common
from configs.convirt import get_config
from medsyn_jax.core import outputs, tree
from medsyn_jax.data.text import tokenizers
from medsyn_jax.models import encoder_configs
from medsyn_jax.models.weights import convert
from medsyn_jax.train import frozen
from medsyn_jax.train import state as states
from medsyn_jax.train.checkpoint import Checkpoints
from scripts import export_encoders

TEXTS = ["The lungs are clear.", "Moderate left pleural effusion, no pneumothorax."]
LEFT_OUT = {
    "timm": "image-timm: left out: timm has no model of this architecture",
    "torchvision": "image-torchvision: left out: torchvision has no model of this architecture",
}
SMALL = {"width": 8, "depths": (1, 2, 1, 1), "stem": "7x7"}
VIT = {"width": 24, "layers": 2, "heads": 3, "mlp_width": 40, "size": 32, "patch": 8}
ENCODERS = {
    "basic, one channel": {**SMALL, "block": "basic", "channels": 1},
    "basic, three channels": {**SMALL, "block": "basic", "channels": 3},
    "bottleneck, one channel": {**SMALL, "block": "bottleneck", "channels": 1},
    "bottleneck, three channels": {**SMALL, "block": "bottleneck", "channels": 3},
    "ViT, one channel": {**VIT, "channels": 1, "eps": 1e-12},
    "ViT, three channels": {**VIT, "channels": 3},
}
RESNET18 = {"width": 64, "depths": (2, 2, 2, 2), "stem": "7x7", "block": "basic"}
TINY = {"width": 192, "layers": 12, "heads": 3, "mlp_width": 768, "size": 32, "patch": 16}


def write_run(workdir, image):
    """What a pre-training run leaves, with the image settings of `image`."""
    config = get_config("smoke")
    config.data.update({"size": 40, "tokens": 12})
    if "patch" in image:
        config.image = common.vit()
    config.image.update({"weights": "", "mean": 0.4, "std": 0.2, **image})
    config.text.update({"layers": 2, "summed": 2})
    tokenizer = tokenizers.train_wordpiece(TEXTS * 2, 60, workdir / "tokenizer")
    make = frozen.pair_maker(config.to_dict(), tokenizer)
    _, *shapes = states.shapes(make)
    params, stats = (tree.unnamed(values(x), x) for x in shapes)
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save({"step": np.int32(7), "params": params, "stats": stats}, {})
    checkpoints.wait()
    checkpoints.close()
    outputs.write_config(workdir, config)
    metrics = {
        "test/image_to_text/recall@1": {"value": 0.25, "n": 40, "ci95": [0.125, 0.4]},
        "test/image_to_text/median_rank": {"value": None, "n": 40},
    }
    outputs.write_results(workdir, "pretrain", metrics)
    return workdir


def values(shapes):
    """Values as of a trained network, by name: no scale is 1, no bias 0."""
    rng = np.random.default_rng(0)

    def draw(name, shape):
        if name.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, shape)
        spread = max(1, np.prod(shape[:-1])) ** -0.5 if name.endswith("kernel") else 0.2
        return rng.normal(0, spread, shape)

    return {k: draw(k, x.shape).astype(np.float32) for k, x in tree.named(shapes).items()}


def our_features(run, images):
    encoder = frozen.pretrained(run)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(frozen.Encoder.pooled)(encoder, images))


def radiographs():
    return np.random.default_rng(1).integers(0, 256, (2, 40, 40), np.uint8)


def error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def test_our_import_takes_the_folders_for_the_same_encoders(tmp_path):
    run = write_run(tmp_path / "run", {**ENCODERS["bottleneck, one channel"], "upsample": 48})
    out = tmp_path / "out"
    lines = export_encoders.export(run, out)
    assert lines == [f"{out}/image-transformers", f"{out}/text-transformers", *LEFT_OUT.values()]
    assert {p.name for p in out.iterdir()} == {"image-transformers", "text-transformers"}
    pair, config = frozen.pretrained_pair(run), json.loads((run / "config.json").read_text())
    for part in ("image", "text"):
        folder, says = out / f"{part}-transformers", []
        settings, ours = config["config"][part], (pair.params[part], pair.stats.get(part, {}))
        assert encoder_configs.agreed(folder, settings, part=part, report=says.append) == settings
        loaded = convert.load(folder, "", *ours, report=says.append)
        assert not says
        for a, b in zip(map(tree.named, loaded), map(tree.named, ours), strict=True):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)
    tokenizer = tokenizers.load(out / "text-transformers")
    for ours, theirs in zip(
        tokenizer.encode(TEXTS, 9), pair.tokenizer.encode(TEXTS, 9), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert tokenizer.pad_id == pair.tokenizer.pad_id
    settings = json.loads((out / "text-transformers" / "tokenizer_config.json").read_text())
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 12,
        **{f"{name.lower()}_token": f"[{name}]" for name in ("CLS", "SEP", "UNK", "PAD", "MASK")},
    }
    processor = json.loads((out / "image-transformers" / "preprocessor_config.json").read_text())
    # 32 of 40 pixels were enlarged to 48: the whole image to 60.
    assert processor["size"] == {"shortest_edge": 60}
    assert processor["crop_size"] == {"height": 48, "width": 48}
    assert (processor["image_mean"], processor["image_std"]) == ([0.4], [0.2])
    assert not processor["do_convert_rgb"]


@pytest.mark.parametrize(
    ("image", "name", "layout", "pool"),
    [
        ({**RESNET18, "channels": 3}, "resnet18", "timm", "avg"),
        ({**TINY, "channels": 1}, "vit_tiny_patch16_224", "timm_vit", "token"),
    ],
)
def test_models_that_timm_names(image, name, layout, pool, tmp_path):
    run, out = write_run(tmp_path / "run", image), tmp_path / "out"
    lines = export_encoders.export(run, out)
    assert lines[2] == f"{out}/image-timm"
    config = json.loads((out / "image-timm" / "config.json").read_text())
    assert (config["architecture"], config["global_pool"]) == (name, pool)
    assert (config["num_classes"], config["num_features"]) == (0, 512 if pool == "avg" else 192)
    pretrained = config["pretrained_cfg"]
    assert pretrained["input_size"] == [image["channels"], 32, 32]
    assert pretrained["crop_pct"] == 0.8
    assert (pretrained["mean"], pretrained["std"]) == (
        [0.4] * image["channels"],
        [0.2] * image["channels"],
    )
    pair, settings = frozen.pretrained_pair(run), json.loads((run / "config.json").read_text())
    ours = pair.params["image"], pair.stats.get("image", {})
    encoder_configs.agreed(
        out / "image-timm", settings["config"]["image"], part="image", report=pytest.fail
    )
    convert.load(out / "image-timm", layout, *ours, report=pytest.fail)
    if pool == "avg":
        assert lines[3] == f"{out}/image-torchvision"
        convert.load(out / "image-torchvision", "torchvision", *ours, report=pytest.fail)
        card = (out / "image-torchvision" / "README.md").read_text()
        assert "torchvision.models.resnet18()" in card
        assert "model.conv1" not in card
    else:
        assert lines[3].startswith("image-torchvision: left out: weights are written for")


def test_a_card_says_what_a_user_needs(tmp_path):
    run, out = write_run(tmp_path / "run", ENCODERS["basic, three channels"]), tmp_path / "out"
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"] |= {"sources": ["runs/mimic", "runs/synthetic"], "weights": [1, 3]}
    config["config"]["image"]["weights"] = "weights/resnet"
    (run / "config.json").write_text(json.dumps(config))
    export_encoders.export(run, out)
    image, text = ((out / f"{p}-transformers" / "README.md").read_text() for p in ("image", "text"))
    count = tree.size(frozen.pretrained(run).params)
    for line in (
        "library_name: transformers",
        "# Image encoder (ResNetModel)",
        f"(block basic, depths (1, 2, 1, 1), width 8, channels 3), 64 features, {count:,} param",
        "AutoModel.from_pretrained(DIR)",
        "of 40 pixels; the central 32 pixels, scaled to [0, 1], minus 0.4, divided by 0.2,",
        "- Method: convirt, 2 epochs at most, batches of 16 pairs, seed 0.",
        "- Data: `runs/mimic` (weight 1), `runs/synthetic` (weight 3).",
        "- Started from: weights/resnet.",
        "| test/image_to_text/recall@1 | 0.25 | 0.125 to 0.4 | 40 |",
        "| test/image_to_text/median_rank | undefined |  | 40 |",
        "Not stated. Name one that the data and the starting weights above allow.",
    ):
        assert line in image
    assert "- Started from: random weights." in text
    assert "were the mean over the tokens without padding of the sum of the last 2 layers" in text


def test_a_run_that_has_not_ended_has_no_figures(tmp_path):
    run = write_run(tmp_path / "run", ENCODERS["basic, one channel"])
    (run / "results.json").unlink()
    export_encoders.export(run, tmp_path / "out")
    card = (tmp_path / "out" / "text-transformers" / "README.md").read_text()
    assert "None: the run has not ended." in card


def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, capsys):
    run = write_run(tmp_path / "run", {"stem": "3x3"})
    capsys.readouterr()
    other, full = tmp_path / "other", tmp_path / "full"
    for folder in (other, full):
        folder.mkdir()
    (other / "config.json").write_text('{"config": {"task": "classify"}}')
    (full / "notes.txt").write_text("mine")

    def stopped(workdir, out):
        status = export_encoders.main([str(workdir), str(out)])
        captured = capsys.readouterr()
        assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
        return captured.err

    new = tmp_path / "new"
    assert "other: not the workdir of a pre-training run" in stopped(other, new)
    assert "nothing: not the workdir of a pre-training run" in stopped(tmp_path / "nothing", new)
    assert "full: is there already and is not overwritten: name another" in stopped(run, full)
    (run / "results.json").write_text('{"metrics": {"te')
    assert "results.json: cannot be read as JSON" in stopped(run, new)
    assert (full / "notes.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"run", "other", "full"}

    (run / "results.json").unlink()
    assert export_encoders.main([str(run), str(new)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "image-transformers: left out: its stem is 3x3, that of transformers 7x7",
        f"{new}/text-transformers",
        *LEFT_OUT.values(),
    ]


@pytest.mark.parity
@pytest.mark.parametrize("image", ENCODERS.values(), ids=ENCODERS)
def test_transformers_computes_the_same_image_features(image, tmp_path):
    """From the image file on: with the processor and the model of the folder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run, out = write_run(tmp_path / "run", image), tmp_path / "out"
    export_encoders.export(run, out)
    folder, vit = out / "image-transformers", "patch" in image
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    options = {"add_pooling_layer": False} if vit else {}
    model, info = transformers.AutoModel.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values())
    inputs = processor([Image.fromarray(x) for x in radiographs()], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, image["channels"], 32, 32)
    with torch.no_grad():
        output = model.eval()(**inputs)
    theirs = output.last_hidden_state[:, 0] if vit else output.pooler_output[..., 0, 0]
    assert error(our_features(run, radiographs()), theirs.numpy()) < 1e-5


@pytest.mark.parity
def test_transformers_computes_the_same_text_states(tmp_path):
    """From the text on: with the tokenizer and the model of the folder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run, out = write_run(tmp_path / "run", ENCODERS["basic, one channel"]), tmp_path / "out"
    export_encoders.export(run, out)
    folder = out / "text-transformers"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, info = transformers.BertModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    assert not any(info.values())
    texts = [*TEXTS, "Unseen words: \N{SNOWMAN}. " * 9]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model.eval()(**tokens, output_hidden_states=True).hidden_states
    pair = frozen.pretrained_pair(run)
    ids, mask = pair.tokenizer.encode(texts, pair.tokens)
    np.testing.assert_array_equal(tokens["input_ids"], ids)
    np.testing.assert_array_equal(tokens["attention_mask"], mask)

    def states_of(params, stats):
        model = nnx.merge(pair.structure, params, stats, copy=True)
        return model.text(jnp.asarray(ids), jnp.asarray(mask))

    with jax.default_matmul_precision("highest"):
        ours = jax.jit(states_of)(pair.params, pair.stats)
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert error(np.asarray(a) * mask[..., None], b.numpy() * mask[..., None]) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("image", [{**RESNET18, "channels": 1}, {**TINY, "channels": 3}])
def test_timm_computes_the_same_features(image, tmp_path):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    run, out = write_run(tmp_path / "run", image), tmp_path / "out"
    export_encoders.export(run, out)
    model = timm.create_model(f"local-dir:{out / 'image-timm'}", pretrained=True).eval()
    assert error(our_features(run, radiographs()), by_torch(torch, model, image)) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("library", ["torchvision", "torch"])
def test_torchvision_computes_the_same_features(library, tmp_path):
    """Its own ResNet where it is installed; beside it, ours in torch with the same names."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from tests.models import torch_resnet

    image = {**RESNET18, "channels": 3}
    if library == "torchvision":
        model = pytest.importorskip("torchvision").models.resnet18()
        model.fc = torch.nn.Identity()
    else:
        model = torch_resnet.ResNet(torch_resnet.Basic, image["depths"])
    run, out = write_run(tmp_path / "run", image), tmp_path / "out"
    export_encoders.export(run, out)
    model.load_state_dict(load_file(out / "image-torchvision" / "model.safetensors"))
    theirs = by_torch(torch, model.eval(), image)
    assert error(our_features(run, radiographs()), theirs) < 1e-5


def by_torch(torch, model, image):
    """The features that a model in torch gives for the centres of the radiographs."""
    pixels = (radiographs()[:, None, 4:36, 4:36] / np.float32(255) - 0.4) / 0.2
    inputs = torch.from_numpy(pixels.astype(np.float32)).expand(-1, image["channels"], -1, -1)
    with torch.no_grad():
        output = model(inputs)
    return (output if isinstance(output, torch.Tensor) else output[-1]).numpy()
