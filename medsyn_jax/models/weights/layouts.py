"""How torchvision, timm and Hugging Face name the weights of the encoders.

A layout is a table of rules from the name of one of our parameters to the key of a file.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
    """A change of axes between the file's tensor and our array, in both directions.

    Some files fuse `parts` equal tensors along the first axis; `part` is the number of this one.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    part: int = 0
    parts: int = 1


SAME = Transform(lambda x: x, lambda x: x)
MATRIX = Transform(np.transpose, np.transpose)
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW, HWIO
TABLE = Transform(lambda x: x[0], lambda x: x[None])  # [1, n, w], [n, w]
TOKEN = Transform(lambda x: x[0, 0], lambda x: x[None, None])  # [1, 1, w], [w]

Rules = tuple[tuple[str, str, Transform], ...]


class Place(NamedTuple):
    """The key of a file's tensor, and the change of axes from there."""

    key: str
    transform: Transform


Plan = dict[str, Place]  # by the name of our parameter


class Layout(NamedTuple):
    """How a family of files names a model's parameters and statistics.

    rules: (regex of our name, template of the file's key, transform). A named group `s` of the
        regex is `{s}` in the template; `{s1}` is the same number counted from one.
    prefix: what `convert.save` writes before every key; a file to read may have any other prefix.
    left_out: regex of keys that may stand beside the encoder, after the prefix or a part of it.
    aliases: other spellings of parts of keys, (ours, other); a file uses all of them or none.
    layer: regex of the part of a key that names a layer; its group is the layer's number.
    """

    rules: Rules
    prefix: str = ""
    left_out: str = "(?!)"
    aliases: tuple[tuple[str, str], ...] = ()
    layer: str = "(?!)"

    def plan(self, names: Iterable[str], prefix: str = "", aliased: bool = False) -> Plan | None:
        """The place in a file of each of our names; None if the layout has no rule for one."""
        plan = {}
        for name in names:
            if (place := self._place(name)) is None:
                return None
            key = prefix + place.key
            for spelling, other in self.aliases if aliased else ():
                key = key.replace(spelling, other)
            plan[name] = Place(key, place.transform)
        if len({(place.key, place.transform.part) for place in plan.values()}) != len(plan):
            raise AssertionError(f"two parameters share a key: {plan}")
        return plan

    def _place(self, name: str) -> Place | None:
        for pattern, template, transform in self.rules:
            if match := re.fullmatch(pattern, name):
                groups = match.groupdict()
                from_one = {k + "1": int(v) + 1 for k, v in groups.items() if v.isdigit()}
                return Place(template.format(**groups, **from_one), transform)
        return None


def norm(ours: str, theirs: str) -> Rules:
    """The rules of a normalization, with or without statistics."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return tuple((f"{ours}/{a}", f"{theirs}.{b}", SAME) for a, b in names.items())


def dense(ours: str, theirs: str, transform: Transform = MATRIX) -> Rules:
    """The rules of a linear layer or convolution; `transform` is that of its kernel."""
    return (
        (f"{ours}/kernel", f"{theirs}.weight", transform),
        (f"{ours}/bias", f"{theirs}.bias", SAME),
    )


def fused(ours: Sequence[str], theirs: str) -> Rules:
    """The rules of linear layers that a file fuses into one."""
    return tuple(
        (pattern, key, transform._replace(part=part, parts=len(ours)))
        for part, name in enumerate(ours)
        for pattern, key, transform in dense(name, theirs)
    )


# Task heads, projections, and the second encoder of self-supervised methods.
_HEADS = (
    r"(cls|(\w+_)?(classifier|heads?|projection|projector|predictor|predictions|prototypes)|fc|nsp"
    r"|head_dist|pre_logits|qa_outputs|seq_relationship|momentum_(encoder|backbone)|encoder_k"
    r"|target_encoder)\..*|(text|visual)_projection|logit_scale|logit_bias|queue|queue_ptr"
)
_BLOCK = r"stages/(?P<s>\d+)/(?P<b>\d+)"
_LAYER = r"layers/(?P<n>\d+)"
_QKV = ("query", "key", "value")


def _resnet(stem: Sequence[str], convs: Sequence[str], shortcut: Sequence[str]) -> Layout:
    """The arguments are the file's names of a convolution and of its normalization."""
    places = {"stem": stem, rf"{_BLOCK}/convs/(?P<c>\d+)": convs, f"{_BLOCK}/shortcut": shortcut}
    rules: list[tuple[str, str, Transform]] = []
    for ours, (conv, norm_of_conv) in places.items():
        rules.append((f"{ours}/conv/kernel", f"{conv}.weight", CONV))
        rules.extend(norm(f"{ours}/norm", norm_of_conv))
    return Layout(tuple(rules), left_out=_HEADS)


TORCHVISION = _resnet(
    stem=("conv1", "bn1"),
    convs=("layer{s1}.{b}.conv{c1}", "layer{s1}.{b}.bn{c1}"),
    shortcut=("layer{s1}.{b}.downsample.0", "layer{s1}.{b}.downsample.1"),
)
_HF_STEM, _HF_BLOCK = "embedder.embedder", "encoder.stages.{s}.layers.{b}"
HF_RESNET = _resnet(
    stem=(f"{_HF_STEM}.convolution", f"{_HF_STEM}.normalization"),
    convs=(f"{_HF_BLOCK}.layer.{{c}}.convolution", f"{_HF_BLOCK}.layer.{{c}}.normalization"),
    shortcut=(f"{_HF_BLOCK}.shortcut.convolution", f"{_HF_BLOCK}.shortcut.normalization"),
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
    aliases=(  # module names of transformers 5, whose files still have the names above
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
