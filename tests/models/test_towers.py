"""The two towers: their initial values, and settings that do not go together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.models import towers
from medsyn_jax.models.layers import split
from tests.train import toy

VIT = {"kind": "vit", "size": 32, "patch": 8, "width": 16, "layers": 11, "heads": 2}
VIT |= {"mlp_width": 32, "channels": 1, "eps": 1e-6, "remat": False}
TEXT = toy.TEXT | {"layers": 2, "max_length": 12}
HEADS = toy.HEADS | {"local": True, "prototypes": 5}


def test_initial_values_are_those_of_earlier_versions():
    """Published figures rest on them. The keys are drawn in the order of the modules."""
    made = jax.jit(
        lambda: split(towers.PairEncoder(VIT, TEXT, HEADS, 20, rngs=nnx.Rngs(3)))[1],
    )()
    first = {name: np.ravel(value)[0] for name, value in tree.named(made).items()}
    for name, value in (
        ("image/cls", -0.03886443),
        ("image/layers/9/up/kernel", -0.0039952635),
        ("text/embeddings/word/table", -0.0308142174),
        ("text/layers/1/down/kernel", 0.0411114581),
        ("image_head/last/kernel", -0.187770963),
        ("text_head/first/kernel", -0.241938591),
        ("region_head/first/kernel", -0.0422326326),
        ("word_head/last/bias", 0.118567348),
        ("prototypes", -0.00558317686),
    ):
        np.testing.assert_allclose(first[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("text", {"summed": 2}, "the last 2 of 1 layers to sum"),
        ("text", {"summed": 0}, "the last 0 of 1 layers to sum"),
        ("text", {"heads": 3}, "the width 16 is no multiple of the 3 heads"),
        ("heads", {"kind": "big"}, "head 'big': choose from normed, mlp, linear"),
        ("image", {"depths": (1, 1)}, "a ResNet has four stages, not 2"),
    ],
)
def test_settings_that_do_not_go_together(section, changes, says):
    settings = {"image": toy.IMAGE, "text": toy.TEXT, "heads": toy.HEADS}
    settings[section] = settings[section] | changes
    with pytest.raises(ValueError, match=says):
        nnx.eval_shape(
            lambda: towers.PairEncoder(*settings.values(), vocab_size=20, rngs=nnx.Rngs(0))
        )


def test_an_image_encoder_without_one_of_its_settings():
    lacking = {name: value for name, value in VIT.items() if name != "patch"}
    with pytest.raises(UserError, match="image encoder: patch is missing: kind=vit needs it"):
        towers.image_encoder(lacking, jnp.float32, nnx.Rngs(0))


def test_a_pooling_that_does_not_exist():
    with pytest.raises(ValueError, match="pooling 'sum': choose from cls, mean, max"):
        towers.pool_tokens(jnp.zeros((1, 2, 3)), jnp.ones((1, 2), bool), "sum")
