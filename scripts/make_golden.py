"""Make the golden files that the default tests compare with, so that these tests need no torch.

    python scripts/make_golden.py        (needs the extra `parity`)

Writes two files in tests/golden and prints their sizes. encoders.npz: weights, inputs and outputs
of small torch and transformers encoders. samplers.npz: results of diffusers' schedulers with a toy
denoiser.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]
import torch_resnet  # noqa: E402

from tests.diffusion import toy  # noqa: E402

BERT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 12}


def state_of(prefix: str, module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {f"{prefix}/weights/{k}": v.numpy() for k, v in module.state_dict().items()}


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    path = ROOT / "tests" / "golden" / name
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} arrays, {path.stat().st_size / 1024:.0f} KiB")


def encoders() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    arrays = {}
    images = torch.randn(2, 3, 40, 40)
    for name, block in (("basic", torch_resnet.Basic), ("bottleneck", torch_resnet.Bottleneck)):
        module = torch_resnet.ResNet(block, (1, 2, 1, 1), 4)
        torch_resnet.randomize(module)
        arrays |= state_of(name, module)
        with torch.no_grad():
            layer3, layer4, pooled = module.eval()(images)
        arrays[f"{name}/layer3"] = layer3.permute(0, 2, 3, 1).numpy()
        arrays[f"{name}/layer4"] = layer4.permute(0, 2, 3, 1).numpy()
        arrays[f"{name}/pooled"] = pooled.numpy()
    arrays["images"] = images.permute(0, 2, 3, 1).numpy()

    bert = BertModel(BertConfig(**BERT), add_pooling_layer=True).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        ids = torch.randint(0, BERT["vocab_size"], (3, 10))
        mask = torch.arange(10)[None] < torch.tensor([[10], [1], [6]])
        out = bert(ids, mask.long(), output_hidden_states=True)
    arrays |= state_of("bert", bert)
    arrays |= {"ids": ids.numpy().astype(np.int32), "mask": mask.numpy()}
    arrays["bert/states"] = np.stack([state.numpy() for state in out.hidden_states])
    arrays["bert/pooled"] = out.pooler_output.numpy()
    return arrays


def samplers() -> dict[str, np.ndarray]:
    return {
        f"{sampler}/{case}": toy.diffusers_sample(sampler, toy.CASES[case], toy.GOLDEN_STEPS)
        for sampler, case in toy.GOLDEN
    }


if __name__ == "__main__":
    save("encoders.npz", encoders())
    save("samplers.npz", samplers())
