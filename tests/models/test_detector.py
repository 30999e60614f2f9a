"""The detector's sizes and shapes, and its outputs against torch with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsyn_jax.core import tree
from medsyn_jax.models.detector import Detector
from medsyn_jax.models.layers import split, statistics

RESNET50 = (512, 1024, 2048)


def maps_of(inputs, cells=2, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    sides = [4 * cells, 2 * cells, cells]
    return [
        rng.standard_normal((batch, n, n, c), np.float32)
        for n, c in zip(sides, inputs, strict=True)
    ]


def test_the_published_size_on_resnet50():
    model = nnx.eval_shape(lambda: Detector(RESNET50, rngs=nnx.Rngs(0)))
    structure, params, stats = split(model)
    assert tree.size(params) == 21_626_934
    shapes = [
        jax.ShapeDtypeStruct((2, n, n, c), jnp.float32)
        for n, c in zip((28, 14, 7), RESNET50, strict=True)
    ]

    def forward(params, stats, maps):
        return nnx.merge(structure, params, stats)(maps, False)

    outputs = jax.eval_shape(forward, params, stats, shapes)
    assert [x.shape for x in outputs] == [(2, 7, 7, 18), (2, 14, 14, 18), (2, 28, 28, 18)]


def test_a_small_detector_of_three_classes_learns_from_all_maps():
    structure, params, stats = split(Detector((8, 16, 32), 3, 16, rngs=nnx.Rngs(0)))
    maps = [jnp.asarray(x) for x in maps_of((8, 16, 32))]

    @jax.jit
    def gradients(params, stats):
        def fine(params):
            model = nnx.merge(structure, params, stats, copy=True)
            outputs = model(maps, True)
            return outputs[2].sum(), (outputs, statistics(model))

        return jax.grad(fine, has_aux=True)(params)

    grads, (outputs, moved) = gradients(params, stats)
    assert [x.shape for x in outputs] == [(2, 2, 2, 24), (2, 4, 4, 24), (2, 8, 8, 24)]
    for before, after in zip(jax.tree.leaves(stats), jax.tree.leaves(moved), strict=True):
        assert (np.asarray(before) != np.asarray(after)).any()
    grads = tree.named(grads)
    assert np.abs(grads["branches/0/convs/4/conv/kernel"]).max() > 0  # through both links
    assert np.abs(grads["branches/0/last/kernel"]).max() == 0


@pytest.mark.parity
@pytest.mark.parametrize("train", [False, True])
def test_outputs_and_gradients_are_torchs(train):
    torch = pytest.importorskip("torch")
    import torch_detector
    from torch import nn

    inputs, width = (12, 24, 48), 32
    torch.manual_seed(0)
    torchs = torch_detector.Detector(inputs, width)
    for module in torchs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.3, 0.3)

    params, stats = split(Detector(inputs, 1, width, rngs=nnx.Rngs(0)))[1:]

    def copied(tensor):
        x = tensor.detach().numpy()
        return jnp.asarray(x.transpose(2, 3, 1, 0) if x.ndim == 4 else x)

    def filled(of_parameter):
        """Our trees, with what `of_parameter` says of each of torch's tensors."""
        named = {}

        def block(name, module):
            conv, norm, _ = module
            named[f"{name}/conv/kernel"] = of_parameter(conv.weight)
            named[f"{name}/norm/scale"] = of_parameter(norm.weight)
            named[f"{name}/norm/bias"] = of_parameter(norm.bias)
            named[f"{name}/norm/mean"] = norm.running_mean
            named[f"{name}/norm/var"] = norm.running_var

        for i, (first, wide, last) in enumerate(torchs.branches):
            for j, module in enumerate([*first, wide]):
                block(f"branches/{i}/convs/{j}", module)
            named[f"branches/{i}/last/kernel"] = of_parameter(last.weight)
            named[f"branches/{i}/last/bias"] = of_parameter(last.bias)
        for i, module in enumerate(torchs.links):
            block(f"links/{i}", module)
        named = {name: copied(tensor) for name, tensor in named.items()}
        return tuple(
            tree.unnamed({k: named.pop(k) for k in tree.named(part)}, part)
            for part in (params, stats)
        )

    maps = maps_of(inputs, 3)
    weights, running = filled(lambda p: p)
    structure = split(Detector(inputs, 1, width, rngs=nnx.Rngs(0)))[0]
    probes = [
        np.random.default_rng(i).standard_normal((2, 3 << i, 3 << i, 18), np.float32)
        for i in range(3)
    ]

    def ours(weights):
        outputs = nnx.merge(structure, weights, running, copy=True)(
            [jnp.asarray(x) for x in maps], train
        )
        return sum((a * p).sum() for a, p in zip(outputs, probes, strict=True)), outputs

    (_, outputs), grads = jax.value_and_grad(ours, has_aux=True)(weights)
    torchs.train(train)
    theirs = torchs([torch.from_numpy(x).permute(0, 3, 1, 2) for x in maps])
    theirs = [x.permute(0, 2, 3, 1) for x in theirs]
    for a, b in zip(outputs, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-4)
    sum((a * torch.from_numpy(p)).sum() for a, p in zip(theirs, probes, strict=True)).backward()
    expected = tree.named(filled(lambda p: p.grad)[0])
    for name, grad in tree.named(grads).items():
        scale = max(float(np.linalg.norm(expected[name])), 1e-2)
        assert float(np.linalg.norm(grad - expected[name])) / scale < 1e-3, name
