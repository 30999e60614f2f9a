"""How diffusers and transformers name the weights of Stable Diffusion's three networks."""

from medsyn_jax.models.weights.layouts import (
    CONV,
    MATRIX,
    SAME,
    Layout,
    Rules,
    Transform,
    dense,
    norm,
)

# From the 1 x 1 convolution of a file, [o, i, 1, 1], to our matrix [i, o].
POINT = Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])


def _resnet(ours: str, theirs: str) -> Rules:
    return (
        *norm(f"{ours}/norm(?P<k>[12])", f"{theirs}.norm{{k}}"),
        *dense(f"{ours}/conv(?P<k>[12])", f"{theirs}.conv{{k}}", CONV),
        *dense(f"{ours}/time", f"{theirs}.time_emb_proj"),
        *dense(f"{ours}/shortcut", f"{theirs}.conv_shortcut", POINT),
    )


def _attention(ours: str, theirs: str) -> Rules:
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
    return tuple(rule for a, b in names.items() for rule in dense(f"{ours}/{a}", f"{theirs}.{b}"))


def _transformer(ours: str, theirs: str, ends: Transform) -> Rules:
    block, their_block = rf"{ours}/blocks/(?P<m>\d+)", f"{theirs}.transformer_blocks.{{m}}"
    return (
        *norm(f"{ours}/norm", f"{theirs}.norm"),
        *dense(f"{ours}/enter", f"{theirs}.proj_in", ends),
        *dense(f"{ours}/leave", f"{theirs}.proj_out", ends),
        *norm(f"{block}/norm(?P<k>[123])", f"{their_block}.norm{{k}}"),
        *_attention(f"{block}/self_attention", f"{their_block}.attn1"),
        *_attention(f"{block}/cross_attention", f"{their_block}.attn2"),
        *dense(f"{block}/up", f"{their_block}.ff.net.0.proj"),
        *dense(f"{block}/down", f"{their_block}.ff.net.2"),
    )


def _unet(ends: Transform) -> Layout:
    """ends: the transform of the projections around a transformer, matrices or convolutions."""
    sides = (
        (r"(?P<d>down|up)/(?P<i>\d+)/layers/(?P<j>\d+)", "{d}_blocks.{i}"),
        (r"mid/(?P<j>\d+)", "mid_block"),
    )
    layers = [
        rule
        for ours, theirs in sides
        for rule in (
            *_resnet(f"{ours}/resnet", f"{theirs}.resnets.{{j}}"),
            *_transformer(f"{ours}/attention", f"{theirs}.attentions.{{j}}", ends),
        )
    ]
    return Layout(
        rules=(
            *dense("enter", "conv_in", CONV),
            *dense("time_up", "time_embedding.linear_1"),
            *dense("time_down", "time_embedding.linear_2"),
            *layers,
            *dense(r"down/(?P<i>\d+)/resample", "down_blocks.{i}.downsamplers.0.conv", CONV),
            *dense(r"up/(?P<i>\d+)/resample", "up_blocks.{i}.upsamplers.0.conv", CONV),
            *norm("norm", "conv_norm_out"),
            *dense("leave", "conv_out", CONV),
        )
    )


UNET_CONV = _unet(POINT)  # SD 1.x
UNET_LINEAR = _unet(MATRIX)  # SD 2.x

_CODER = "(?P<c>encoder|decoder)"
_LEVEL = r"levels/(?P<i>\d+)"
VAE = Layout(
    rules=(
        *dense(f"{_CODER}/enter", "{c}.conv_in", CONV),
        *_resnet(rf"encoder/{_LEVEL}/blocks/(?P<j>\d+)", "encoder.down_blocks.{i}.resnets.{j}"),
        *dense(f"encoder/{_LEVEL}/resample", "encoder.down_blocks.{i}.downsamplers.0.conv", CONV),
        *_resnet(rf"decoder/{_LEVEL}/blocks/(?P<j>\d+)", "decoder.up_blocks.{i}.resnets.{j}"),
        *dense(f"decoder/{_LEVEL}/resample", "decoder.up_blocks.{i}.upsamplers.0.conv", CONV),
        *_resnet(f"{_CODER}/mid/first", "{c}.mid_block.resnets.0"),
        *norm(f"{_CODER}/mid/attention/norm", "{c}.mid_block.attentions.0.group_norm"),
        *_attention(f"{_CODER}/mid/attention/attention", "{c}.mid_block.attentions.0"),
        *_resnet(f"{_CODER}/mid/second", "{c}.mid_block.resnets.1"),
        *norm(f"{_CODER}/norm", "{c}.conv_norm_out"),
        *dense(f"{_CODER}/leave", "{c}.conv_out", CONV),
        *dense("quant", "quant_conv", POINT),
        *dense("post_quant", "post_quant_conv", POINT),
    ),
    aliases=tuple(
        (f"attentions.0.{new}.{end}", f"attentions.0.{old}.{end}")
        for new, old in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        )
        for end in ("weight", "bias")
    ),
)

_N = r"layers/(?P<n>\d+)"
CLIP_TEXT = Layout(
    rules=(
        ("word/table", "embeddings.token_embedding.weight", SAME),
        ("position/table", "embeddings.position_embedding.weight", SAME),
        *norm(f"{_N}/attention_norm", "encoder.layers.{n}.layer_norm1"),
        *(
            rule
            for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out"))
            for rule in dense(f"{_N}/{ours}", f"encoder.layers.{{n}}.self_attn.{theirs}_proj")
        ),
        *norm(f"{_N}/mlp_norm", "encoder.layers.{n}.layer_norm2"),
        *dense(f"{_N}/up", "encoder.layers.{n}.mlp.fc1"),
        *dense(f"{_N}/down", "encoder.layers.{n}.mlp.fc2"),
        *norm("norm", "final_layer_norm"),
    ),
    prefix="text_model.",  # as transformers 4 wrote; later versions read both
    # The other parts of a whole CLIPModel.
    left_out=r"embeddings\.position_ids|(text|visual)_projection\.weight|logit_scale"
    r"|vision_model\..*",
)
