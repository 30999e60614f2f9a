"""Weights in and out: `safetensors` files in the layouts of torchvision, timm and Hugging Face.

An import is a bijection: every key of the file goes to exactly one place, every parameter and
statistic is filled, every shape is equal. One prefix ("bert.", "module.base_encoder.") may stand
before all keys of an encoder. What else a file may hold (classifiers, heads of pre-training, the
decoder of a masked autoencoder) is named in the layout's table, left out, and told to the log.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import replaced
from medsyn_jax.models.weights import files
from medsyn_jax.models.weights.files import Tensors, shorter

Tree = dict[str, Any]


class Transform(NamedTuple):
    """A change of axes, from the file's to ours and back, of part number `part` of the `parts`
    equal ones that the file's tensor is cut into along its first axis."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    part: int = 0
    parts: int = 1


SAME = Transform(lambda x: x, lambda x: x)
MATRIX = Transform(np.transpose, np.transpose)
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW, HWIO
TABLE = Transform(lambda x: x[0], lambda x: x[None])  # [1, n, w], [n, w]
TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])  # [1, 1, w], [w]


class Place(NamedTuple):
    """A key of the file, and the change of axes from there."""

    key: str
    transform: Transform


Plan = dict[str, Place]  # by our name
Rules = tuple[tuple[str, str, Transform], ...]


class Layout(NamedTuple):
    """How a family of files names a model's leaves.

    rules: (regex of our name, template of the file's key, transform). A named group `s` of the
        regex is `{s}` in the template, and `{s1}` is the same number counted from one.
    prefix: what `save` writes before every key; a file to read may have any other.
    left_out: regex of keys that may be there besides, after the prefix or a part of it.
    aliases: other spellings of what is in keys (ours, other), all or none of which a file uses.
    layer: regex of what is in the keys of a layer; its group is the layer's number.
    """

    rules: Rules
    prefix: str = ""
    left_out: str = "(?!)"
    aliases: tuple[tuple[str, str], ...] = ()
    layer: str = "(?!)"


def norm(ours: str, theirs: str) -> Rules:
    """The rules of a normalization, whatever statistics it has."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple((f"{ours}/{a}", f"{theirs}.{b}", SAME) for a, b in names.items())


def dense(ours: str, theirs: str, transform: Transform = MATRIX) -> Rules:
    """The rules of a linear layer, whose `transform` is that of its kernel."""
    return (
        (f"{ours}/kernel", f"{theirs}.weight", transform),
        (f"{ours}/bias", f"{theirs}.bias", SAME),
    )


def fused(ours: Sequence[str], theirs: str) -> Rules:
    """The rules of linear layers whose outputs are one after another those of one of the file."""
    return tuple(
        (pattern, key, transform._replace(part=part, parts=len(ours)))
        for part, name in enumerate(ours)
        for pattern, key, transform in dense(name, theirs)
    )


# Task heads, projections, and the encoder that follows another one in self-supervision.
_HEADS = (
    r"(cls|(\w+_)?(classifier|heads?|projection|projector|predictor|predictions|prototypes)|fc|nsp"
    r"|head_dist|pre_logits|qa_outputs|seq_relationship|momentum_(encoder|backbone)|encoder_k"
    r"|target_encoder)\..*|(text|visual)_projection|logit_scale|logit_bias|queue|queue_ptr"
)
_BLOCK = r"stages/(?P<s>\d+)/(?P<b>\d+)"
_CONV = _BLOCK + r"/convs/(?P<c>\d+)"
_LAYER = r"layers/(?P<n>\d+)"
_QKV = ("query", "key", "value")

TORCHVISION = Layout(
    rules=(
        ("stem/conv/kernel", "conv1.weight", CONV),
        *norm("stem/norm", "bn1"),
        (f"{_CONV}/conv/kernel", "layer{s1}.{b}.conv{c1}.weight", CONV),
        *norm(f"{_CONV}/norm", "layer{s1}.{b}.bn{c1}"),
        (f"{_BLOCK}/shortcut/conv/kernel", "layer{s1}.{b}.downsample.0.weight", CONV),
        *norm(f"{_BLOCK}/shortcut/norm", "layer{s1}.{b}.downsample.1"),
    ),
    left_out=_HEADS,
)
_STAGE = "encoder.stages.{s}.layers.{b}"
HF_RESNET = Layout(
    rules=(
        ("stem/conv/kernel", "embedder.embedder.convolution.weight", CONV),
        *norm("stem/norm", "embedder.embedder.normalization"),
        (f"{_CONV}/conv/kernel", f"{_STAGE}.layer.{{c}}.convolution.weight", CONV),
        *norm(f"{_CONV}/norm", f"{_STAGE}.layer.{{c}}.normalization"),
        (f"{_BLOCK}/shortcut/conv/kernel", f"{_STAGE}.shortcut.convolution.weight", CONV),
        *norm(f"{_BLOCK}/shortcut/norm", f"{_STAGE}.shortcut.normalization"),
    ),
    left_out=_HEADS,
)
HF_BERT = Layout(
    rules=(
        ("embeddings/word/table", "embeddings.word_embeddings.weight", SAME),
        ("embeddings/position/table", "embeddings.position_embeddings.weight", SAME),
        ("embeddings/type/table", "embeddings.token_type_embeddings.weight", SAME),
        *norm("embeddings/norm", "embeddings.LayerNorm"),
        *dense(f"{_LAYER}/(?P<a>query|key|value)", "encoder.layer.{n}.attention.self.{a}"),
        *dense(f"{_LAYER}/out", "encoder.layer.{n}.attention.output.dense"),
        *norm(f"{_LAYER}/attention_norm", "encoder.layer.{n}.attention.output.LayerNorm"),
        *dense(f"{_LAYER}/up", "encoder.layer.{n}.intermediate.dense"),
        *dense(f"{_LAYER}/down", "encoder.layer.{n}.output.dense"),
        *norm(f"{_LAYER}/mlp_norm", "encoder.layer.{n}.output.LayerNorm"),
        *dense("pooler", "pooler.dense"),
    ),
    left_out=rf"{_HEADS}|(bert\.)?(embeddings\.position_ids|pooler\.dense\.(weight|bias))",
    aliases=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    layer=r"encoder\.layer\.(\d+)\.",
)
HF_VIT = Layout(
    rules=(
        ("cls", "embeddings.cls_token", TOKEN),
        ("position/table", "embeddings.position_embeddings", TABLE),
        *dense("patches", "embeddings.patch_embeddings.projection", CONV),
        *norm(f"{_LAYER}/attention_norm", "encoder.layer.{n}.layernorm_before"),
        *dense(f"{_LAYER}/(?P<a>query|key|value)", "encoder.layer.{n}.attention.attention.{a}"),
        *dense(f"{_LAYER}/out", "encoder.layer.{n}.attention.output.dense"),
        *norm(f"{_LAYER}/mlp_norm", "encoder.layer.{n}.layernorm_after"),
        *dense(f"{_LAYER}/up", "encoder.layer.{n}.intermediate.dense"),
        *dense(f"{_LAYER}/down", "encoder.layer.{n}.output.dense"),
        *norm("norm", "layernorm"),
    ),
    left_out=rf"{_HEADS}|(vit\.)?pooler\.dense\.(weight|bias)|embeddings\.mask_token|decoder\..*",
    aliases=(  # of the modules of transformers 5, which still writes the others into files
        ("encoder.layer.", "layers."),
        *((f"attention.attention.{a}", f"attention.{a[0]}_proj") for a in _QKV),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ),
    layer=r"(?:encoder\.layer|layers)\.(\d+)\.",
)
TIMM_VIT = Layout(
    rules=(
        ("cls", "cls_token", TOKEN),
        ("position/table", "pos_embed", TABLE),
        *dense("patches", "patch_embed.proj", CONV),
        *norm(f"{_LAYER}/attention_norm", "blocks.{n}.norm1"),
        *fused([f"{_LAYER}/{a}" for a in _QKV], "blocks.{n}.attn.qkv"),
        *dense(f"{_LAYER}/out", "blocks.{n}.attn.proj"),
        *norm(f"{_LAYER}/mlp_norm", "blocks.{n}.norm2"),
        *dense(f"{_LAYER}/up", "blocks.{n}.mlp.fc1"),
        *dense(f"{_LAYER}/down", "blocks.{n}.mlp.fc2"),
        *norm("norm", "norm"),
    ),
    left_out=rf"{_HEADS}|mask_token|decoder[._].*",
    layer=r"blocks\.(\d+)\.",
)
LAYOUTS = {
    "torchvision": TORCHVISION,
    "timm": TORCHVISION,
    "hf_resnet": HF_RESNET,
    "hf_bert": HF_BERT,
    "timm_vit": TIMM_VIT,
    "hf_vit": HF_VIT,
}


def load(
    path: str | Path,
    layout: str | Layout,
    params: Tree,
    stats: Tree,
    *,
    layers: int | None = None,
    dtype: DTypeLike = np.float32,
    report: Callable[[str], None] | None = None,
) -> tuple[Tree, Tree]:
    """The weights of a file in trees like `params` and `stats`, as numpy arrays of `dtype`.

    path: a .safetensors file, the .safetensors.index.json of a sharded one, or their folder.
    layout: a name of LAYOUTS, "" to find out, or a layout itself. params, stats: anything with
    shapes. layers: keeps only so many of the file's first layers, for a transformer that has no
    more. report: gets the lines that name what was left out; without it the log does.
    Raises UserError that lists what is missing, extra or misshapen, or says what is wrong with the
    file itself.
    """
    path = Path(path)
    tensors = files.read(path)
    ours = tree.named(params) | tree.named(stats)
    report = report or logging.getLogger(__name__).info
    plan, chosen, prefix = _plan(tensors, layout, ours, path)
    if layers is not None and (beyond := _beyond(tensors, chosen, layers)):
        tensors = {key: value for key, value in tensors.items() if key not in beyond}
        report(f"{path}: left out layers {layers} to {max(beyond.values())}, counted from 0")
    keys = {place.key for place in plan.values()}
    beside = {key: _left_out(key, chosen, prefix) for key in sorted(tensors.keys() - keys)}
    drop = {key: family for key, family in beside.items() if family}
    counters = {_counter(key) for key in keys if key.endswith(".running_var")}
    _refuse_misfits(path, tensors, ours, plan, drop.keys() | counters)
    if drop:
        families = [f"{family}* ({count})" for family, count in Counter(drop.values()).items()]
        names = map(shorter, drop if len(drop) <= 16 else families)
        report(f"{path}: left out by name: {', '.join(names)}")
    flat = {k: np.ascontiguousarray(_taken(tensors, place), dtype) for k, place in plan.items()}
    if odd := [plan[k].key for k, x in flat.items() if not np.isfinite([x.min(), x.max()]).all()]:
        raise UserError(f"weights: {path}: NaN or infinity in {len(odd)}: {shorter(odd[0])}, ...")
    return (
        tree.unnamed({name: flat[name] for name in tree.named(params)}, params),
        tree.unnamed({name: flat[name] for name in tree.named(stats)}, stats),
    )


def save(path: str | Path, layout: str | Layout, params: Tree, stats: Tree) -> None:
    """Writes a .safetensors file that torch's `load_state_dict(strict=True)` of `layout` accepts.

    Of "hf_vit" transformers 4 does; 5 reads the same file by `from_pretrained`, which renames its
    modules on the way. The file appears only when it is complete. Raises UserError when it cannot
    be written, or when the model has parts that the layout has no name for.
    """
    path, ours = Path(path), tree.named(params) | tree.named(stats)
    if path.suffix != ".safetensors":
        raise UserError(f"weights: {path}: the name of the file to write must end in .safetensors")
    layout = _layout(layout)
    plan = _expected(layout, ours, layout.prefix)
    if plan is None:
        raise UserError(f"weights: {path}: this layout has no names for this model's leaves")
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, (key, transform) in plan.items():
        leaf = transform.write(np.asarray(jax.device_get(ours[name])))
        found.setdefault(key, {})[transform.part] = leaf
    tensors = {}
    for key, parts in found.items():
        whole = [parts[number] for number in sorted(parts)]
        whole = np.concatenate(whole) if whole[1:] else whole[0]
        tensors[key] = np.ascontiguousarray(whole)  # safetensors writes the memory as it lies
        if key.endswith(".running_var"):
            tensors[_counter(key)] = np.zeros((), np.int64)
    try:
        with replaced(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights: {path}: cannot be written: {error}") from error


def _layout(name: str | Layout) -> Layout:
    if isinstance(name, Layout):
        return name
    if name not in LAYOUTS:
        raise UserError(f"weights: layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _place(layout: Layout, name: str) -> Place | None:
    for pattern, template, transform in layout.rules:
        if found := re.fullmatch(pattern, name):
            groups = found.groupdict()
            fields = {k + "1": int(v) + 1 for k, v in groups.items() if v.isdigit()}
            return Place(template.format(**groups, **fields), transform)
    return None


def _expected(layout: Layout, names: Tree, prefix: str = "", aliased: bool = False) -> Plan | None:
    """Where every leaf is in a file, or None if the layout has no name for one of them."""
    plan = {}
    for name in names:
        if (place := _place(layout, name)) is None:
            return None
        key = prefix + place.key
        for spelling, other in layout.aliases if aliased else ():
            key = key.replace(spelling, other)
        plan[name] = Place(key, place.transform)
    if len({(place.key, place.transform.part) for place in plan.values()}) != len(plan):
        raise AssertionError(f"two leaves share a key: {plan}")
    return plan


def _cuts(key: str) -> Iterator[tuple[str, str]]:
    """The key cut in two before each of its names: ("", "a.b"), ("a.", "b")."""
    yield "", key
    for dot in re.finditer(r"\.", key):
        yield key[: dot.end()], key[dot.end() :]


def _plan(
    tensors: Tensors, layout: str | Layout, ours: Tree, path: Path
) -> tuple[Plan, Layout, str]:
    """The naming that shares most keys with the file, of `layout` or, if that is "", of all; its
    layout; and the prefix of the file's keys."""
    best, best_count = None, -1
    for candidate in [_layout(layout)] if layout else LAYOUTS.values():
        for aliased in (False, True) if candidate.aliases else (False,):
            if (plan := _expected(candidate, ours, "", aliased)) is None:
                continue
            keys = {place.key for place in plan.values()}
            counts = Counter(a for key in tensors for a, b in _cuts(key) if b in keys)
            heads = {x for x in counts if _left_out(x, candidate, f"{x}.")}  # a last resort
            prefix = max(counts, key=lambda x: (x not in heads, counts[x], -len(x)), default="")
            if counts[prefix] > best_count:
                best, best_count = (plan, candidate, prefix), counts[prefix]
    if best is None:
        raise UserError(f"weights: {path}: layout {layout or 'any'} does not fit this model")
    plan, candidate, prefix = best
    if "roberta" in prefix:
        raise UserError(f"weights: {path}: {prefix}*: a RoBERTa counts positions otherwise")
    plan = {name: place._replace(key=prefix + place.key) for name, place in plan.items()}
    return plan, candidate, prefix


def _left_out(key: str, layout: Layout, prefix: str) -> str:
    """The start of a key that may be there besides, after all that it has of the prefix; or ""."""
    for start, rest in _cuts(key):
        shared = start == prefix if key.startswith(prefix) else prefix.startswith(start)
        if shared and re.fullmatch(layout.left_out, rest):
            return start + re.split(r"(?<=[._])", rest, maxsplit=1)[0]
    return ""


def _beyond(tensors: Tensors, layout: Layout, layers: int) -> dict[str, int]:
    """The keys of the file's layers after so many, with the number of the layer."""
    found = {key: re.search(layout.layer, key) for key in tensors}
    numbers = {key: int(number[1]) for key, number in found.items() if number}
    return {key: number for key, number in numbers.items() if number >= layers}


def _taken(tensors: Tensors, place: Place) -> np.ndarray:
    """A leaf of ours; lets go of a tensor that holds no other, since a U-Net's are 3.4 GB."""
    key, transform = place
    if transform.parts == 1:
        return transform.read(tensors.pop(key))
    return transform.read(np.split(tensors[key], transform.parts)[transform.part])


def _counter(key: str) -> str:
    """torch counts the batches that a BatchNorm has seen; we do not, and write 0."""
    return key.removesuffix("running_var") + "num_batches_tracked"


def _refuse_misfits(
    path: Path, tensors: Tensors, ours: Tree, plan: Plan, allowed: set[str]
) -> None:
    keys = {place.key for place in plan.values()}
    misshapen, mistyped = [], []
    for name, (key, transform) in plan.items():
        if key not in tensors:
            continue
        given, wanted = tensors[key].shape, tuple(ours[name].shape)
        whole = transform.write(np.broadcast_to(np.float32(0), wanted)).shape
        if transform.parts > 1:
            whole = (transform.parts * whole[0], *whole[1:])
        if given != whole:
            misshapen.append(f"{key} {list(given)} for {name} {list(wanted)}")
        if tensors[key].dtype.name not in ("float32", "float16", "bfloat16"):
            mistyped.append(f"{key} {tensors[key].dtype}")
    found = {
        "missing": sorted(keys - tensors.keys()),
        "extra": sorted(tensors.keys() - keys - allowed),
        "misshapen": misshapen,
        "neither float32, float16 nor bfloat16": mistyped,
    }
    parts = [
        f"{len(odd)} {what}: {', '.join(map(shorter, odd[:4]))}{' ...' if len(odd) > 4 else ''}"
        for what, odd in found.items()
        if odd
    ]
    if parts:
        raise UserError(f"weights: {path}: does not fit the model: {'; '.join(parts)}")
