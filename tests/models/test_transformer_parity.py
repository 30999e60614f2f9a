"""Where the transformers' [CLS] looks, and the vision transformer, against Hugging Face's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsyn_jax.core import tree
from medsyn_jax.models.vit import ViT
from medsyn_jax.models.weights import convert

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from test_parity import abstract, bert_base, error, imported, random, report  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5


def randomized(module):
    """Norms, biases and matrices far from where they start, so that attention is not uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
            elif "query" in name or "key" in name or "q_proj" in name or "k_proj" in name:
                tensor.normal_(0, 0.5)
            else:
                tensor.normal_(0, 0.2)
    return module.eval()


def test_attention_of_bert_cls(tmp_path, capsys):
    """The last layer's, with padding."""
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=20,
        attn_implementation="eager",
    )
    module = randomized(transformers.BertModel(config))
    model = abstract(bert_base(config))
    params, _ = imported(module, "hf_bert", model, tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (3, 17))
    mask = np.arange(17)[None] < np.array([17, 1, 6])[:, None]
    with torch.no_grad():
        theirs = module(
            torch.from_numpy(ids), torch.from_numpy(mask).long(), output_attentions=True
        )

    def run(params):
        network = nnx.merge(model[0], params, {}, copy=True)
        states = network(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
        return network.cls_attention(states, jnp.asarray(mask))

    with jax.default_matmul_precision("highest"):
        ours = jax.jit(run)(params)
    last = theirs.attentions[-1][:, :, 0]
    report(capsys, "BERT's [CLS] attention", {"weights": error(ours, last)}, TOLERANCE)
    assert np.asarray(ours)[0].max() > 0.3


@pytest.mark.parametrize("classifier", [False, True])
def test_hugging_face_vit(classifier, tmp_path, capsys):
    """In evaluation, from its own folder and back, with gradients."""
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=20,
        patch_size=4,
        num_channels=2,
        attn_implementation="eager",
    )
    of = transformers.ViTForImageClassification if classifier else transformers.ViTModel
    source = randomized(of(config))
    source.save_pretrained(tmp_path / "hub")
    module = source.vit if classifier else source
    model = abstract(lambda: ViT(20, 4, 24, 3, 3, 40, 2, eps=1e-12, rngs=nnx.Rngs(0)))
    params, _ = convert.load(tmp_path / "hub", "", *model[1:])
    images = random((2, 20, 20, 2), 1)
    probes = random((2, 26, 24), 2), random((2, 3, 25), 3)
    out = module(torch.from_numpy(images).permute(0, 3, 1, 2), output_attentions=True)
    theirs = out.last_hidden_state, out.attentions[-1][:, :, 0, 1:]
    sum((y * torch.from_numpy(p)).sum() for y, p in zip(theirs, probes, strict=True)).backward()
    module.pooler = None
    gradients, _ = imported(module, "hf_vit", model, tmp_path, gradients=True)

    def objective(params):
        seen = nnx.merge(model[0], params, {}, copy=True)(jnp.asarray(images), train=False)
        states = jnp.concatenate([seen.pooled[:, None], seen.patches], 1)
        ours = states, seen.cls_attention
        return sum(jnp.sum(y * p) for y, p in zip(ours, probes, strict=True)), ours

    with jax.default_matmul_precision("highest"):
        found, ours = jax.jit(jax.grad(objective, has_aux=True))(params)
    names = ("states", "attention")
    errors = {n: error(a, b.detach()) for n, a, b in zip(names, ours, theirs, strict=True)}
    report(capsys, "Hugging Face ViT outputs", errors, TOLERANCE)
    found, expected = tree.named(found), tree.named(gradients)
    beside = {name: expected[name.replace("/key/bias", "/query/bias")] for name in expected}
    errors = {name: error(found[name], expected[name], beside[name]) for name in expected}
    report(capsys, "Hugging Face ViT gradients", errors, TOLERANCE)

    convert.save(tmp_path / "hub" / "model.safetensors", "hf_vit", params, {})
    fresh, info = transformers.ViTModel.from_pretrained(
        tmp_path / "hub", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(info.values())
    state = module.state_dict()
    assert fresh.state_dict().keys() == state.keys()
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, state[key]), key
