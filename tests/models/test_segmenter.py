"""The decoders: published size, shapes on any pyramid, start, torch, and SegFormer's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from medsyn_jax.core import tree
from medsyn_jax.models import segmenter
from medsyn_jax.models.layers import split, statistics
from medsyn_jax.models.resnet import ResNet

RESNET50 = (64, 256, 512, 1024, 2048)


def test_on_resnet_50_it_has_the_published_numbers_of_parameters():
    def run(images):
        maps = ResNet((3, 4, 6, 3), rngs=nnx.Rngs(0)).pyramid(images, False)
        channels, sides = [x.shape[3] for x in maps], [x.shape[1] for x in maps]
        widths = segmenter.widths(channels, sides, 224)
        model = segmenter.Decoder(channels, widths, rngs=nnx.Rngs(0))
        return maps, split(model)[1], model(maps, 224, True)

    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    maps, params, logits = jax.eval_shape(run, images)
    assert [x.shape[1:] for x in maps] == [
        (112, 112, 64),
        (56, 56, 256),
        (28, 28, 512),
        (14, 14, 1024),
        (7, 7, 2048),
    ]
    assert tree.size(params["blocks"]) == 9_012_928
    assert tree.size(params["out"]) == 145
    assert (logits.shape, logits.dtype) == ((2, 224, 224), jnp.float32)


@pytest.mark.parametrize(
    ("sides", "size", "blocks"),
    [
        ((16, 8, 4, 2, 1), 32, (8, 8, 8, 8, 8)),
        ((16, 16, 8, 4, 2), 32, (8, 8, 8, 8, 8)),  # the stem "3x3" has no pool
        ((15, 8, 4, 2, 1), 29, (8, 8, 8, 8, 8)),  # sides that no stride divides
        ((4,), 64, (8, 8, 8, 8)),  # the patches of a ViT
        ((4,), 56, (8, 8, 8, 8)),  # and of 14 pixels
    ],
)
def test_logits_have_the_size_of_the_image(sides, size, blocks):
    rng = np.random.default_rng(0)
    channels = range(3, 3 + len(sides))
    maps = [
        jnp.asarray(rng.normal(size=(2, s, s, c)), jnp.float32)
        for s, c in zip(sides, channels, strict=True)
    ]
    assert segmenter.widths(channels, sides, size) == blocks
    model = segmenter.Decoder(channels, blocks, rngs=nnx.Rngs(0))
    logits = model(maps, size, True)
    assert logits.shape == (2, size, size)
    for i in range(len(maps)):  # each map has a say in the logits
        changed = [x + 1 if i == j else x for j, x in enumerate(maps)]
        assert np.abs(model(changed, size, False) - model(maps, size, False)).max() > 1e-4


def test_pixels_become_pairs_and_an_odd_side_loses_the_last():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    rows = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(segmenter.enlarged(x, 4)[0, :, :, 0], rows)
    np.testing.assert_array_equal(segmenter.enlarged(x, 3)[0, :, :, 0], np.array(rows)[:3, :3])
    assert segmenter.enlarged(x, 2) is x


def test_kernels_start_uniform_within_their_bounds():
    model = segmenter.Decoder((4, 16), (8, 8), rngs=nnx.Rngs(0))
    params = split(model)[1]
    first = np.asarray(params["blocks"]["0"]["convs"]["0"]["conv"]["kernel"])
    he, xavier = (6 / (9 * 20)) ** 0.5, (6 / (9 * 8 + 9)) ** 0.5
    assert 0.95 * he < np.abs(first).max() <= he
    assert 0.85 * xavier < np.abs(params["out"]["kernel"]).max() <= xavier
    assert (np.asarray(params["out"]["bias"]) == 0).all()


def test_fewer_blocks_than_maps_are_refused():
    with pytest.raises(ValueError, match="1 blocks for 2 maps"):
        segmenter.Decoder((4, 16), (8,), rngs=nnx.Rngs(0))


def test_the_mlp_decoder_is_segformers_formula():
    """Two linear layers of a concatenation in a row are one of each map, and a sum."""
    rng = np.random.default_rng(0)
    channels, sides, width, size = (3, 5, 7), (8, 4, 2), 6, 32
    maps = [rng.normal(size=(2, s, s, c)) for s, c in zip(sides, channels, strict=True)]
    model = segmenter.MLPDecoder(channels, width, rngs=nnx.Rngs(0))
    each = [rng.normal(size=(c, 4)) for c in channels]
    fuse = rng.normal(size=(12, width))
    for i, weights in enumerate(each):
        model.each[str(i)].kernel[...] = jnp.asarray(weights @ fuse[4 * i : 4 * i + 4])[None, None]
    enlarged = [
        np.repeat(np.repeat(x @ w, n, 1), n, 2)
        for x, w, n in zip(maps, each, (1, 2, 4), strict=True)
    ]
    hidden = np.concatenate(enlarged, -1) @ fuse
    hidden = (hidden - hidden.mean((0, 1, 2))) / np.sqrt(hidden.var((0, 1, 2)) + 1e-5)
    weights, bias = np.asarray(model.out.kernel)[0, 0], np.asarray(model.out.bias)
    small = (np.maximum(hidden, 0) @ weights + bias)[..., 0].astype(np.float32)
    want = [Image.fromarray(x).resize((size, size), Image.Resampling.BILINEAR) for x in small]
    logits = model([jnp.asarray(x, jnp.float32) for x in maps], size, True)
    np.testing.assert_allclose(logits, np.stack([np.asarray(x) for x in want]), atol=1e-4)


@pytest.mark.parity
def test_values_gradients_and_statistics_are_torchs():
    torch = pytest.importorskip("torch")
    import torch_segmenter

    channels, widths, size = (4, 8, 8, 16, 32), (16, 8, 8, 4, 4), 32
    sides = (16, 8, 4, 2, 1)
    rng = np.random.default_rng(0)
    maps = [
        rng.normal(size=(3, s, s, c)).astype(np.float32)
        for s, c in zip(sides, channels, strict=True)
    ]
    structure, params, stats = split(segmenter.Decoder(channels, widths, rngs=nnx.Rngs(0)))

    def placed(kernel):
        return torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1))

    theirs = torch_segmenter.Decoder(channels, widths)
    blocks = [params["blocks"][str(i)]["convs"] for i in range(5)]
    for block, layers in zip(blocks, theirs.blocks, strict=True):
        for j in (0, 1):
            layers[3 * j].weight.data = placed(block[str(j)]["conv"]["kernel"])
    theirs.out.weight.data = placed(params["out"]["kernel"])
    theirs.out.bias.data = torch.tensor(np.asarray(params["out"]["bias"]))
    want = theirs([torch.tensor(x.transpose(0, 3, 1, 2)) for x in maps])
    direction = rng.normal(size=want.shape).astype(np.float32)
    (want * torch.tensor(direction)).sum().backward()

    def ours(params):
        model = nnx.merge(structure, params, stats, copy=True)
        logits = model([jnp.asarray(x) for x in maps], size, True)
        return (logits * direction).sum(), (logits, statistics(model))

    with jax.default_matmul_precision("highest"):
        grads, (logits, moved) = jax.grad(ours, has_aux=True)(params)
    scale = np.abs(want.detach().numpy()).max()
    np.testing.assert_allclose(logits, want.detach().numpy(), atol=1e-5 * scale)
    for i, block in enumerate(theirs.blocks):
        for j in (0, 1):
            mine = grads["blocks"][str(i)]["convs"][str(j)]["conv"]["kernel"]
            grad = block[3 * j].weight.grad.numpy().transpose(2, 3, 1, 0)
            np.testing.assert_allclose(mine, grad, atol=1e-4 * np.abs(grad).max())
            mine = moved["blocks"][str(i)]["convs"][str(j)]["norm"]["var"]
            np.testing.assert_allclose(mine, block[3 * j + 1].running_var, rtol=1e-4)
