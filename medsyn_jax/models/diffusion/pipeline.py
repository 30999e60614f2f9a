"""A Stable Diffusion pipeline in the folder format of diffusers.

    model_index.json  unet/  vae/  text_encoder/ (config.json, .safetensors)  tokenizer/  scheduler/

`read` takes such a folder (SD 1.x and 2.x, RoentGen). `write` makes one that
`diffusers.StableDiffusionPipeline.from_pretrained` opens and runs.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from medsyn_jax.core.errors import UserError
from medsyn_jax.models.diffusion import configs
from medsyn_jax.models.layers import Tree, split
from medsyn_jax.models.weights import convert, diffusers_layouts
from medsyn_jax.models.weights.files import read_object
from medsyn_jax.models.weights.layouts import Layout

PARTS = ("unet", "vae", "text_encoder")
# transformers opens a network in the dtype of its file, diffusers in float32. A pipeline of both
# fails unless the config of the former names the dtype.
_TRANSFORMERS_CONFIG = {"dtype": "float32"}


class Kind(NamedTuple):
    """A part of the pipeline: its library and class there, its weights file and our module."""

    library: str
    cls: str
    file: str
    maker: Callable[[Mapping[str, Any], str], Callable[..., nnx.Module]]
    layout: Callable[[Mapping[str, Any]], Layout]


def _unet_layout(config: Mapping[str, Any]) -> Layout:
    linear = config.get("use_linear_projection", False)
    return diffusers_layouts.UNET_LINEAR if linear else diffusers_layouts.UNET_CONV


_FILE = "diffusion_pytorch_model.safetensors"
KINDS = {
    "unet": Kind("diffusers", "UNet2DConditionModel", _FILE, configs.unet, _unet_layout),
    "vae": Kind("diffusers", "AutoencoderKL", _FILE, configs.vae, lambda _: diffusers_layouts.VAE),
    "text_encoder": Kind(
        "transformers",
        "CLIPTextModel",
        "model.safetensors",
        configs.text_encoder,
        lambda _: diffusers_layouts.CLIP_TEXT,
    ),
}


@dataclass(frozen=True)
class Part:
    """A network: its config.json, the maker of its module, and the module's parameters.

    make: called as make(rngs, dtype=float32, remat=False); `layers.split` of what it returns gives
    the structure for `nnx.merge(structure, params, {}, copy=True)`.
    """

    config: Mapping[str, Any]
    make: Callable[..., nnx.Module]
    params: Tree


@dataclass(frozen=True)
class Pipeline:
    """A pipeline in memory.

    parts: by names of PARTS. scheduler: scheduler_config.json, for `diffusion.schedule` to read.
    tokenizer: the folder of its tokenizer, which stays on disk.
    """

    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any]
    tokenizer: Path

    @property
    def scaling_factor(self) -> float:
        """The factor of latents at the input of the U-Net."""
        return float(self.parts["vae"].config.get("scaling_factor", 0.18215))


def part(name: str, config: Mapping[str, Any], params: Tree, where: str = "") -> Part:
    """A part from its config.json. Raises UserError for a value that is not supported."""
    return Part(config, KINDS[name].maker(config, where or f"{name}/config.json"), params)


def module_of(
    part: Part, dtype: DTypeLike = np.float32, remat: bool = False
) -> Callable[[Tree], Any]:
    """A function from the part's parameters to its module, for use under `jax.jit`."""
    structure = split(_outline(part.make, dtype=dtype, remat=remat))[0]
    return lambda params: nnx.merge(structure, params, {}, copy=True)


class _Keys(nnx.Rngs):
    """Keys without a counter, which would make tracing time quadratic in the number of layers."""

    def __init__(self):
        pass

    def params(self) -> jax.Array:
        return jax.random.key(0)


def _outline(make: Callable[..., nnx.Module], **options: Any) -> nnx.Module:
    """The module with shapes in the place of arrays."""
    return nnx.eval_shape(lambda: make(_Keys(), **options))


def read(
    folder: str | Path,
    parts: Sequence[str] = PARTS,
    *,
    dtype: DTypeLike = np.float32,
    report: Callable[[str], None] | None = None,
) -> Pipeline:
    """The named parts of a pipeline folder, their parameters as numpy arrays of `dtype`.

    report: gets a line about keys that were left out of a file. Raises UserError if a part is
    missing, of another class, unsupported, damaged, or does not fit its config.
    """
    folder = Path(folder)
    index = _json(folder / "model_index.json", "give the folder of a diffusers pipeline")
    if index.get("_class_name") != "StableDiffusionImg2ImgPipeline":  # which has the same parts
        _expect(index.get("_class_name"), "StableDiffusionPipeline", folder, "_class_name")
    for name in parts:
        entry = index.get(name)  # [library, class]
        cls = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        _expect(cls, KINDS[name].cls, folder, name)
    for name in (*parts, "tokenizer", "scheduler"):
        if not (folder / name).is_dir():
            raise UserError(
                f"pipeline: {folder}: the part {name}/ is missing: copy the whole folder"
            )
    loaded = {name: _read_part(folder / name, KINDS[name], dtype, report) for name in parts}
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = _json(path, "copy it there")
    if not isinstance(scheduler.get("_class_name"), str):  # `write` names it in model_index.json
        raise UserError(f"pipeline: {path}: _class_name: is missing: copy the whole file")
    # diffusers' StableDiffusionPipeline makes the same changes.
    if "steps_offset" in scheduler:
        scheduler["steps_offset"] = 1
    if scheduler.get("clip_sample") is True:
        scheduler["clip_sample"] = False
    return Pipeline(loaded, scheduler, folder / "tokenizer")


def _read_part(
    folder: Path, kind: Kind, dtype: DTypeLike, report: Callable[[str], None] | None
) -> Part:
    config = _json(folder / "config.json", "copy it there")
    if kind.library == "transformers":
        config.pop("dtype", None)  # of the file, not of the computation
    make = kind.maker(config, f"pipeline: {folder / 'config.json'}")
    layout = kind.layout(config)
    params, stats = split(_outline(make))[1:]
    params, _ = convert.load(_file(folder, kind), layout, params, stats, dtype=dtype, report=report)
    return Part(config, make, params)


def _file(folder: Path, kind: Kind) -> Path:
    """The folder, if it has a plain weights file, else its fp16 variant, if it has one.

    Other files (non_ema, LoRA) may stand beside them.
    """
    plain = any((folder / f"{kind.file}{end}").is_file() for end in ("", ".index.json"))
    half = folder / kind.file.replace(".safetensors", ".fp16.safetensors")
    return half if half.is_file() and not plain else folder


def _expect(value: Any, wanted: str, folder: Path, field: str) -> None:
    if value != wanted:
        raise UserError(
            f"pipeline: {folder / 'model_index.json'}: {field} is {value!r}, must be {wanted!r}"
        )


def _json(path: Path, advice: str) -> dict[str, Any]:
    return read_object(path, "pipeline", advice)


def write(folder: str | Path, pipeline: Pipeline) -> None:
    """Write a pipeline with all PARTS; the folder appears only when it is complete.

    An earlier pipeline in this folder is replaced. Weights keep the dtype of the parameters. Raises
    UserError if the folder is no pipeline, is the source of the tokenizer, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"pipeline: {folder}: is there already and is no pipeline: name another")
    if folder.resolve() == pipeline.tokenizer.resolve().parent:
        raise UserError(f"pipeline: {folder}: is where this pipeline was read from: name another")
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{s}") for s in ("part", "old"))
    try:
        _write_parts(new, pipeline)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if old.exists():  # the new one could not take its place
            os.replace(old, folder)
        raise UserError(f"pipeline: {folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write_parts(folder: Path, pipeline: Pipeline) -> None:
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
    }
    index |= dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None))
    for name in PARTS:
        kind, network = KINDS[name], pipeline.parts[name]
        index[name] = (kind.library, kind.cls)
        convert.save(folder / name / kind.file, kind.layout(network.config), network.params, {})
        extra = _TRANSFORMERS_CONFIG if kind.library == "transformers" else {}
        _dump(folder / name / "config.json", {**network.config, **extra})
    shutil.copytree(pipeline.tokenizer, folder / "tokenizer")
    index["tokenizer"] = ("transformers", _tokenizer_class(pipeline.tokenizer))
    (folder / "scheduler").mkdir()
    _dump(folder / "scheduler" / "scheduler_config.json", pipeline.scheduler)
    index["scheduler"] = ("diffusers", pipeline.scheduler["_class_name"])
    _dump(folder / "model_index.json", index)


def _tokenizer_class(folder: Path) -> str:
    path = folder / "tokenizer_config.json"
    return _json(path, "copy it there").get("tokenizer_class", "CLIPTokenizer")


def _dump(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n")
