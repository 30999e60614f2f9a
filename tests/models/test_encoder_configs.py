"""A model folder's own description against the settings of a run: agreed, or one line."""

import json
import re

import pytest

from configs import convirt, gloria, mgca
from medsyn_jax.core.errors import UserError
from medsyn_jax.models import encoder_configs

CLINICAL_BERT = {  # as of 2019: without model_type and layer_norm_eps
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
    "vocab_size": 28996,
}
DEIT = {"model_type": "vit", "hidden_size": 768, "layer_norm_eps": 1e-12, "image_size": 224}
RESNET_50 = {
    "model_type": "resnet",
    "depths": [3, 4, 6, 3],
    "downsample_in_first_stage": False,
    "embedding_size": 64,
    "hidden_act": "relu",
    "hidden_sizes": [256, 512, 1024, 2048],
    "layer_type": "bottleneck",
    "num_channels": 3,
}
TIMM_VIT = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"mean": [0.5], "std": [0.5]}}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BERT = gloria.get_config("paper").text.to_dict()
VIT = mgca.get_config("vit").image.to_dict()
RESNET = convirt.get_config("pairs").image.to_dict()


def agreed(folder, settings, config=None, images=None, **options):
    """What comes back, and the lines that were said."""
    for name, content in (("config", config), ("preprocessor_config", images)):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}.json").write_text(text)
    said = []
    options = {"part": "config.image", **options}
    return encoder_configs.agreed(folder, settings, report=said.append, **options), said


def refused(folder, *arguments, **options):
    with pytest.raises(UserError) as error:
        agreed(folder, *arguments, **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (BERT, CLINICAL_BERT),
        (convirt.get_config("paper").text.to_dict(), CLINICAL_BERT),
        (mgca.get_config("paper").text.to_dict(), CLINICAL_BERT),  # its first six layers
        (BERT, {"model_type": "cxr-bert", "auto_map": {"AutoModel": "a.B"}, "projection_size": 8}),
        (RESNET, RESNET_50),
        (RESNET, {"architecture": "resnet50", "num_features": 2048}),
        (VIT, TIMM_VIT),
        (VIT, TIMM_VIT | {"architecture": "deit_base_patch16_224"}),
        (VIT, {"config": "of a run, say"}),
        (BERT | {"width": 24, "layers": 2}, {"model_type": "bert", "num_attention_heads": 12}),
        (BERT, None),
    ],
)
def test_published_folders_agree_with_the_recipes(settings, config, tmp_path):
    assert agreed(tmp_path, settings, config) == (settings, [])
    assert agreed(tmp_path / "model.safetensors", settings) == (settings, [])


def test_the_epsilon_is_the_folders(tmp_path):
    found, said = agreed(tmp_path, VIT, DEIT)
    assert found == VIT | {"eps": 1e-12}
    assert said == [f"{tmp_path}/config.json: layer normalization with its epsilon, not with 1e-06"]
    found, _ = agreed(tmp_path, BERT, CLINICAL_BERT | {"layer_norm_eps": 1e-5})
    assert found["eps"] == 1e-5


@pytest.mark.parametrize(
    ("settings", "config", "says"),
    [
        (BERT, {"num_attention_heads": 8}, "num_attention_heads is 8, config.text.heads is 12"),
        (BERT | {"heads": 8}, {"model_type": "bert"}, "heads is 12, config.text.heads is 8"),
        (BERT, {"hidden_act": "relu"}, "hidden_act is 'relu': we compute gelu, gelu_python alone"),
        (BERT, {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        (BERT, {"hidden_act": ["gelu"]}, "hidden_act is ('gelu',)"),
        (BERT, {"model_type": "roberta"}, "model_type is 'roberta'"),
        (BERT, {"model_type": "bert", "position_embedding_type": "relative_key"}, "relative_key"),
        (BERT, {"model_type": "bert", "is_decoder": True}, "is_decoder is True"),
        (BERT, {"num_hidden_layers": 6}, "layers is 6, config.text.layers is 12: choose other"),
        (BERT | {"layers": 6}, CLINICAL_BERT, "train with --config.text.layers=12"),
        (BERT | {"truncate": True}, {"num_hidden_layers": 6}, "num_hidden_layers is 6"),
        (BERT | {"truncate": True}, {"num_hidden_layers": "13"}, "num_hidden_layers is '13'"),
        (BERT, {"max_position_embeddings": 514}, "max_position_embeddings is 514"),
        (BERT, {"num_attention_heads": None}, "num_attention_heads is None"),
        (BERT, {"type_vocab_size": 1}, "type_vocab_size is 1, config.text.types is 2"),
        (BERT, {"model_type": "bert", "layer_norm_eps": "x"}, "layer_norm_eps is 'x'"),
        (BERT, '{"hidden_size": 768, "layer_norm_eps": NaN}', "layer_norm_eps is nan"),
        (BERT, {"hidden_size": ["y" * 9000]}, "...,"),
        (BERT, "[" * 100_000, "nested too deep"),
        (BERT, "[]", "must hold one JSON object"),
        (BERT, "{", "cannot be read as JSON"),
        (VIT, {"num_attention_heads": 6}, "num_attention_heads is 6, config.image.heads is 12"),
        (VIT, {"hidden_size": 768, "patch_size": [32, 32]}, "patch_size is 32"),
        (VIT, {"hidden_size": 768, "image_size": 384}, "image_size is 384"),
        (VIT, {"hidden_size": 768, "hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        (VIT, {"model_type": "beit"}, "model_type is 'beit'"),
        (VIT, RESNET_50, "model_type is 'resnet'"),
        (VIT, {"architecture": "vit_small_patch16_224"}, "number of heads is 6"),
        (VIT, {"architecture": "vit_base_patch16_clip_quickgelu_224"}, "we compute a plain vit"),
        (VIT, TIMM_VIT | {"model_args": {"num_heads": 6}}, "number of heads is 6"),
        (VIT, TIMM_VIT | {"model_args": {"act_layer": "relu"}}, "model_args is ('act_layer',)"),
        (VIT, TIMM_VIT | {"model_args": "x"}, "model_args is 'x': we compute num_classes"),
        (RESNET, {"architecture": "resnet50", "model_args": [[]]}, "model_args is ([],)"),
        (RESNET, RESNET_50 | {"depths": [3, 4, 23, 3]}, "--config.image.depths=(3,4,23,3)"),
        (RESNET, RESNET_50 | {"layer_type": "basic"}, "layer_type is 'basic'"),
        (RESNET, RESNET_50 | {"hidden_act": "gelu"}, "hidden_act is 'gelu': we compute relu alone"),
        (
            RESNET,
            RESNET_50 | {"downsample_in_bottleneck": True},
            "downsample_in_bottleneck is True",
        ),
        (RESNET, {"architecture": "resnetblur50"}, "architecture is 'resnetblur50'"),
    ],
)
def test_what_differs_is_one_line(settings, config, says, tmp_path):
    part = "config.image" if "kind" in settings else "config.text"
    said = refused(tmp_path, settings, config, part=part)
    assert said.startswith(f"weights: {tmp_path}/config.json: ")
    assert says in said
    assert not re.search("--config[^=]*=('\\d|None|True)", said)  # no advice that cannot be taken


@pytest.mark.parametrize(
    ("images", "mean", "std"),
    [
        (IMAGENET, 0.449, 0.226),
        (IMAGENET | {"do_rescale": False}, 0.00176, 0.000886),
        ({"image_mean": 123.0, "image_std": 64, "rescale_factor": 1.0}, 0.482, 0.251),
        ({"do_normalize": False}, 0, 1),
        ({"image_mean": [0.5307] * 3, "image_std": [0.2583] * 3}, 0.5307, 0.2583),
    ],
)
def test_the_normalization_of_a_folder(images, mean, std, tmp_path):
    """Refused unless equal; greys in [-1, 1], as MGCA's recipe has them, are said."""
    alike = RESNET | {"mean": mean, "std": std}
    assert agreed(tmp_path, alike, RESNET_50, images) == (alike, [])
    said = refused(tmp_path, RESNET, RESNET_50, images, pixels="config.encoder")
    assert f"images had mean {str(mean)[:5]}" in said
    assert f"give --config.encoder.mean={str(mean)[:5]}" in said
    recipe = convirt.get_config("paper").image.to_dict()
    found, said = agreed(tmp_path, recipe, RESNET_50, images)
    assert found == recipe
    assert len(said) == 1
    assert "greys are brought to [-1, 1], as config.image.mean and config.image.std say" in said[0]


@pytest.mark.parametrize(
    "images",
    [
        {"image_mean": ["a"], "image_std": [1]},
        {"image_mean": [0.5], "image_std": [0.0]},
        {"image_mean": [[0.5]], "image_std": [0.2]},
        '{"image_mean": [NaN], "image_std": [0.2]}',
        IMAGENET | {"rescale_factor": "x"},
        IMAGENET | {"rescale_factor": 0},
        IMAGENET | {"rescale_factor": None},
        IMAGENET | {"rescale_factor": {}},
        "[]",
    ],
)
def test_a_senseless_normalization_is_one_line(images, tmp_path):
    assert "preprocessor_config.json" in refused(tmp_path, RESNET, RESNET_50, images)


def test_timms_normalization(tmp_path):
    config = {"architecture": "resnet50", "mean": [0.485, 0.456, 0.406], "std": [0.2] * 3}
    assert "--config.image.mean=0.449 --config.image.std=0.2" in refused(tmp_path, RESNET, config)


@pytest.mark.parity
@pytest.mark.parametrize("heads", [2, 4])
def test_a_folder_of_transformers_runs_as_there(heads, tmp_path):
    """With the folder's heads and epsilon; the shapes alone would let any of them pass."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from medsyn_jax.models import towers
    from medsyn_jax.models.layers import split
    from medsyn_jax.models.weights import convert

    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=32,
        max_position_embeddings=16,
        layer_norm_eps=0.01,
    )
    torch.manual_seed(0)
    theirs = transformers.BertModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    sizes = {"width": 24, "layers": 2, "heads": 2, "mlp_width": 32, "max_length": 16}
    settings, options = BERT | sizes | {"dropout": 0.0}, {"part": "config.text"}
    if heads == 4:
        assert "heads is 4, config.text.heads is 2" in refused(tmp_path, settings, **options)
        settings["heads"] = 4
    settings, _ = agreed(tmp_path, settings, **options)
    model = nnx.eval_shape(
        lambda: towers.text_encoder(settings, 50, jnp.dtype("float32"), nnx.Rngs(0))
    )
    structure, params, stats = split(model)
    params, _ = convert.load(tmp_path, "", params, stats)
    ids = np.arange(12).reshape(2, 6)
    run = jax.jit(lambda p, x: nnx.merge(structure, p, {}, copy=True)(x, x >= 0))
    with jax.default_matmul_precision("highest"), torch.no_grad():
        states = run(params, jnp.asarray(ids))
        expected = theirs(torch.from_numpy(ids)).last_hidden_state
    np.testing.assert_allclose(states[-1], expected, atol=2e-5)
