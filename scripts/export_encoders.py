"""Export the encoders of a pre-training run to folders that PyTorch libraries load.

    python -m scripts.export_encoders runs/convirt-demo exported

Writes the encoders of the best checkpoint, fp32, without their projection heads:

    image-transformers  ResNetModel or ViTModel of transformers, with its image processor
    text-transformers   BertModel of transformers, with its tokenizer
    image-timm          where timm has the architecture: `timm.create_model("local-dir:...")`
    image-torchvision   where torchvision has the architecture (ResNets)

Each folder has a README.md: a model card with the data, the input, the figures of the run and the
lines that load it. Prints the folders, and why one is left out. An existing folder is never
overwritten.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import new_folder, write_text
from medsyn_jax.core.log import number
from medsyn_jax.core.outputs import write_json
from medsyn_jax.models import encoder_configs
from medsyn_jax.models.weights import convert
from medsyn_jax.models.weights.files import read_object
from medsyn_jax.train import checkpoint, frozen

LANCZOS = 1  # PIL's number
# The names of timm and torchvision, by block and depths at width 64.
RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
# timm's, by width, layers, heads and width of the MLP, with patches of 16 pixels.
VITS = {
    (192, 12, 3, 768): "vit_tiny_patch16_224",
    (384, 12, 6, 1536): "vit_small_patch16_224",
    (768, 12, 12, 3072): "vit_base_patch16_224",
    (1024, 24, 16, 4096): "vit_large_patch16_224",
}
CARD = """---
library_name: {library}
tags: [chest-x-ray, medsyn_jax]
---
# {title}

{about} Projection heads are not part of this folder.

    {code}

## Input

{inputs}

## Pre-training

{training}

## Figures

{figures}

## Licence

Not stated. Name one that the data and the starting weights above allow.

For research on methods. Not a medical device.
"""


class Run(NamedTuple):
    """A pre-training run and its best pair of encoders."""

    folder: Path
    config: dict[str, Any]
    pair: frozen.Pair

    def save(self, folder: Path, part: str, layout: str) -> None:
        """Write the weights of "image" or "text" as model.safetensors of `folder`."""
        stats = self.pair.stats.get(part, {})
        convert.save(folder / "model.safetensors", layout, self.pair.params[part], stats)


def export(workdir: Path, out: Path) -> list[str]:
    """Write all folders below `out`, and return a line for each.

    Raises UserError if `workdir` is no pre-training run with a checkpoint, or `out` is not empty.
    """
    with new_folder(out) as folder:
        run = Run(workdir, checkpoint.read_config(workdir), frozen.pretrained_pair(workdir))
        writers = {
            "image-transformers": image_transformers,
            "text-transformers": text_transformers,
            "image-timm": image_timm,
            "image-torchvision": image_torchvision,
        }
        reasons = {name: write(run, folder / name) for name, write in writers.items()}
    return [
        f"{out / name}" if not reason else f"{name}: left out: {reason}"
        for name, reason in reasons.items()
    ]


def image_transformers(run: Run, folder: Path) -> str:
    """Write a ResNetModel or ViTModel; returns why not, "" if it is written."""
    import transformers

    image = run.config["image"]
    if reason := _odd_stem(image):
        return reason
    config = {"resnet": transformers.ResNetConfig, "vit": transformers.ViTConfig}[image["kind"]]
    name = config.__name__.replace("Config", "Model")
    fields = encoder_configs.for_transformers(image)
    config(**fields, architectures=[name], dtype="float32").save_pretrained(folder)
    run.save(folder, "image", f"hf_{image['kind']}")
    resized, side = _sides(run)
    processor = {
        "image_processor_type": "CLIPImageProcessor",  # resize, crop, rescale, normalize
        "do_convert_rgb": image["channels"] == 3,
        "do_resize": True,
        "size": {"shortest_edge": resized},
        "resample": LANCZOS,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [image["mean"]] * image["channels"],
        "image_std": [image["std"]] * image["channels"],
    }
    write_json(folder / "preprocessor_config.json", processor)
    vit = image["kind"] == "vit"
    _write_image_card(
        run,
        folder,
        "transformers",
        name,
        "from transformers import AutoImageProcessor, AutoModel",
        "processor = AutoImageProcessor.from_pretrained(DIR)",
        f"model = AutoModel.from_pretrained(DIR{', add_pooling_layer=False' * vit}).eval()",
        'output = model(**processor(image, return_tensors="pt"))  # image: of PIL, mode "L"',
        "features = "
        + ("output.last_hidden_state[:, 0]" if vit else "output.pooler_output[..., 0, 0]"),
    )
    return ""


def text_transformers(run: Run, folder: Path) -> str:
    """Write a BertModel with its tokenizer; returns ""."""
    import transformers

    text, tokenizer = run.config["text"], run.pair.tokenizer
    weights = run.pair.params["text"]
    vocab = len(weights["embeddings"]["word"]["table"])
    transformers.BertConfig(
        **encoder_configs.for_transformers(text),
        vocab_size=vocab,
        pad_token_id=tokenizer.pad_id,
        hidden_dropout_prob=text["dropout"],
        attention_probs_dropout_prob=text["dropout"],
        architectures=["BertModel"],
        dtype="float32",
    ).save_pretrained(folder)
    run.save(folder, "text", "hf_bert")
    _write_tokenizer(run.pair, folder)
    layers = (
        "the last layer" if text["summed"] == 1 else f"the sum of the last {text['summed']} layers"
    )
    pooled = {"cls": "the state of [CLS]", "mean": "the mean", "max": "the maximum"}[
        text["pooling"]
    ]
    over = "" if text["pooling"] == "cls" else " over the tokens without padding"
    sections = " and ".join(run.config["data"]["sections"])
    about = (
        "The text encoder of a pre-training on image-report pairs: a BERT (layers "
        f"{text['layers']}, heads {text['heads']}, width {text['width']}), {vocab} word pieces, "
        f"{tree.size(weights):,} parameters."
    )
    inputs = (
        f"The {sections} of a report, cut at {run.pair.tokens} tokens with [CLS] and [SEP]. The "
        f"features of a report were {pooled}{over} of {layers}."
    )
    _write_card(
        run,
        folder,
        "transformers",
        "Text encoder (BertModel)",
        about,
        inputs,
        "from transformers import AutoTokenizer, BertModel",
        "tokenizer = AutoTokenizer.from_pretrained(DIR)",
        "model = BertModel.from_pretrained(DIR, add_pooling_layer=False).eval()",
        'tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")',
        "states = model(**tokens, output_hidden_states=True).hidden_states",
    )
    return ""


def _write_tokenizer(pair: frozen.Pair, folder: Path) -> None:
    """The tokenizer as it is, whatever class its folder named."""
    tokenizer = pair.tokenizer
    cls, sep = tokenizer.encode([""], 2)[0][0].tolist()
    tokens = {
        "cls_token": tokenizer.backend.id_to_token(cls),
        "sep_token": tokenizer.backend.id_to_token(sep),
        "unk_token": getattr(tokenizer.backend.model, "unk_token", None),
        "pad_token": tokenizer.pad_token,
        "mask_token": "[MASK]" if tokenizer.backend.token_to_id("[MASK]") is not None else None,
    }
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": pair.tokens}
    settings |= {name: token for name, token in tokens.items() if token}
    write_json(folder / "tokenizer_config.json", settings)


def image_timm(run: Run, folder: Path) -> str:
    """Write a model that timm builds by name; returns why not, "" if it is written."""
    image, vit = run.config["image"], run.config["image"]["kind"] == "vit"
    name = _vit_name(image) if vit else _resnet_name(image)
    if not name:
        return "timm has no model of this architecture"
    resized, side = _sides(run)
    channels, features = image["channels"], _features(run)
    first_conv, classifier = ("patch_embed.proj", "head") if vit else ("conv1", "fc")
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": features,
        "global_pool": "token" if vit else "avg",
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [channels, side, side],
            "fixed_input_size": vit,
            "interpolation": "lanczos",
            "crop_pct": side / resized,
            "crop_mode": "center",
            "mean": [image["mean"]] * channels,
            "std": [image["std"]] * channels,
            "num_classes": 0,
            "pool_size": None if vit else [-(-side // 32)] * 2,
            # timm adapts the first layer from three channels alone.
            "first_conv": first_conv if channels == 3 else None,
            "classifier": classifier,
        },
    }
    run.save(folder, "image", "timm_vit" if vit else "timm")
    write_json(folder / "config.json", config)
    _write_image_card(
        run,
        folder,
        "timm",
        f"{name} of timm",
        "import timm",
        'model = timm.create_model("local-dir:DIR", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        f'features = model(transform(image.convert("{"RGB" if channels == 3 else "L"}"))[None])',
    )
    return ""


def image_torchvision(run: Run, folder: Path) -> str:
    """Write the state of a ResNet of torchvision; returns why not, "" if it is written."""
    image = run.config["image"]
    if image["kind"] == "vit":
        return "weights are written for the ResNets of torchvision alone"
    if not (name := _resnet_name(image)):
        return "torchvision has no model of this architecture"
    run.save(folder, "image", "torchvision")
    grey = [f"model.conv1 = torch.nn.Conv2d({image['channels']}, 64, 7, 2, 3, bias=False)"]
    _write_image_card(
        run,
        folder,
        "torchvision",
        f"{name} of torchvision",
        "import safetensors.torch, torch, torchvision",
        f"model = torchvision.models.{name}().eval()",
        "model.fc = torch.nn.Identity()",
        *(grey if image["channels"] != 3 else []),
        'model.load_state_dict(safetensors.torch.load_file("DIR/model.safetensors"))',
    )
    return ""


def _odd_stem(image: dict[str, Any]) -> str:
    odd = image["kind"] == "resnet" and image["stem"] != "7x7"
    return f"its stem is {image.get('stem')}, that of transformers 7x7" if odd else ""


def _resnet_name(image: dict[str, Any]) -> str:
    named = image["stem"] == "7x7" and image["width"] == 64
    return RESNETS.get((image["block"], tuple(image["depths"])), "") if named else ""


def _vit_name(image: dict[str, Any]) -> str:
    sizes = tuple(image[name] for name in ("width", "layers", "heads", "mlp_width"))
    return VITS.get(sizes, "") if (image["patch"], image["eps"]) == (16, 1e-6) else ""


def _sides(run: Run) -> tuple[int, int]:
    """Pixels of the shorter side after resizing, and of the crop that the encoder gets."""
    pair, upsample = run.pair, run.config["image"]["upsample"]
    side = upsample or pair.crop
    return round(pair.size * side / pair.crop), side


def _features(run: Run) -> int:
    image = run.config["image"]
    if image["kind"] == "vit":
        return image["width"]
    return encoder_configs.for_transformers(image)["hidden_sizes"][-1]


def _write_image_card(run: Run, folder: Path, library: str, name: str, *code: str) -> None:
    image, pair = run.config["image"], run.pair
    names = ("size", "patch", "width", "layers", "heads", "mlp_width")
    names = names if image["kind"] == "vit" else ("block", "depths", "width")
    sizes = ", ".join(f"{n} {tuple(x) if isinstance(x := image[n], list) else x}" for n in names)
    about = (
        "The image encoder of a pre-training on image-report pairs: a "
        f"{'ViT' if image['kind'] == 'vit' else 'ResNet'} ({sizes}, channels "
        f"{image['channels']}), {_features(run)} features, "
        f"{tree.size(pair.params['image']):,} parameters."
    )
    resized, side = _sides(run)
    inputs = (
        f"Grey radiographs, bone bright, square, of {pair.size} pixels; the central {pair.crop} "
        f"pixels, scaled to [0, 1], minus {image['mean']}, divided by {image['std']}, the same in "
        "each channel."
    )
    if image["upsample"]:
        inputs += (
            f" The run then enlarged them to {side} pixels (bilinear, corner on corner). The "
            f"settings in this folder resize to {resized} and crop {side}, which blurs less."
        )
    _write_card(run, folder, library, f"Image encoder ({name})", about, inputs, *code)


def _write_card(
    run: Run, folder: Path, library: str, title: str, about: str, inputs: str, *code: str
) -> None:
    config, facts = run.config, read_object(run.folder / "config.json", "export")
    data, part = config["data"], "text" if title.startswith("Text") else "image"
    weighted = zip(data["sources"], data["weights"], strict=False)
    sources = ", ".join(f"`{source}` (weight {weight:g})" for source, weight in weighted)
    training = (
        f"- Method: {config['method']}, {config['train']['epochs']:g} epochs at most, batches of "
        f"{data['batch_size']} pairs, seed {config['seed']}.\n"
        f"- Data: {sources}. `phantom` is a procedural corpus without patients.\n"
        f"- Started from: {config[part]['weights'] or 'random weights'}.\n"
        f"- Commit of medsyn_jax: {facts.get('commit') or 'unknown'}."
    )
    text = CARD.format(
        library=library,
        title=title,
        about=about,
        code="\n    ".join(code),
        inputs=inputs,
        training=training,
        figures=_figures(run.folder / "results.json"),
    )
    write_text(folder / "README.md", text)


def _figures(path: Path) -> str:
    if not path.exists():
        return "None: the run has not ended."
    metrics = read_object(path, "export").get("metrics", {})
    rows = ["| figure | value | 95 % interval | n |", "|---|---|---|---|"]
    for name, entry in metrics.items():
        interval = " to ".join(map(number, entry.get("ci95") or ()))
        rows.append(f"| {name} | {number(entry['value'])} | {interval} | {entry.get('n', '')} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="workdir of a pre-training run")
    parser.add_argument("out", type=Path, help="a new folder")
    args = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax warns about things that users cannot change
    try:
        print("\n".join(export(args.run, args.out)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
