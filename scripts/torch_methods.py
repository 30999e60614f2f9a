"""ConVIRT, GLoRIA and MGCA in plain torch, as their authors' code computes them, for benchmarks.

Encoders have the config's sizes and random weights. Words are sums of their pieces by `index_add_`,
where the official code looks strings up in Python; masks, means and loops are those of the official
code.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
import torch_resnet

VOCABULARY = 28996  # of Bio_ClinicalBERT
TAUS = (4.0, 5.0, 10.0)


def cross_entropies(logits: torch.Tensor) -> torch.Tensor:
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def local_loss(v: torch.Tensor, t: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """GLoRIA's local loss of regions [b, d, r] and words [b, d, w], report by report."""
    columns = []
    for report, count in zip(t, counts, strict=True):
        word = report[:, :count].unsqueeze(0).repeat(len(v), 1, 1)  # [b, d, w]
        logits = torch.bmm(v.transpose(1, 2), word)  # [b, r, w]
        attention = (TAUS[0] * logits.softmax(-1)).softmax(1)
        context = torch.bmm(v, attention)  # [b, d, w]
        cos = F.cosine_similarity(word, context, dim=1)
        columns.append(torch.logsumexp(TAUS[1] * cos, 1, keepdim=True))
    return cross_entropies(TAUS[2] * torch.cat(columns, 1))


def bert(vocab: int, text: Any, attention: str) -> BertModel:
    """text: settings as in configs/common.py."""
    sizes = {"hidden_size": text.width, "num_hidden_layers": text.layers}
    sizes |= {"num_attention_heads": text.heads, "intermediate_size": text.mlp_width}
    config = BertConfig(vocab_size=vocab, **sizes, attn_implementation=attention)
    return BertModel(config, add_pooling_layer=False)


def resnet(image: Any) -> torch_resnet.ResNet:
    return torch_resnet.ResNet(depths=tuple(image.depths), width=image.width)


def by_word(pieces: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Sum pieces [b, t, d] by word number [b, t], -1 for padding."""
    b, t, d = pieces.shape
    rows = (t + 1) * torch.arange(b, device=words.device)[:, None]
    places = (torch.where(words < 0, t, words) + rows).flatten()
    sums = pieces.new_zeros(b * (t + 1), d).index_add(0, places, pieces.flatten(0, 1))
    return sums.view(b, t + 1, d)[:, :-1]


class Convirt(nn.Module):
    def __init__(self, vocab: int, config: Any):
        super().__init__()
        self.image, self.text = resnet(config.image), bert(vocab, config.text, "sdpa")
        features = 32 * config.image.width
        self.heads = nn.ModuleList(Head(n, config.heads) for n in (features, config.text.width))

    def forward(self, images, ids, mask, words):
        pooled, states = self.image(images)[2], self.text(ids, mask).last_hidden_state
        image, report = self.heads[0](pooled), self.heads[1](states[:, 0])
        return cross_entropies(image @ report.T / 0.07)


class Gloria(nn.Module):
    def __init__(self, vocab: int, config: Any):
        super().__init__()
        self.image, self.text = resnet(config.image), bert(vocab, config.text, "sdpa")
        width, features = config.heads.width, 32 * config.image.width
        self.local = nn.Conv2d(features // 2, width, 1, bias=False)
        self.whole = nn.Linear(features, width)

    def forward(self, images, ids, mask, words):
        layer3, _, pooled = self.image(images)
        states = self.text(ids, mask, output_hidden_states=True).hidden_states
        pieces = torch.stack(states[-4:]).sum(0)
        real = mask[..., None].to(pieces.dtype)
        report = (pieces * real).sum(1) / real.sum(1)
        image, report = F.normalize(self.whole(pooled), dim=1), F.normalize(report, dim=1)
        regions = self.local(layer3).flatten(2)
        t = by_word(pieces, words).transpose(1, 2)
        counts = words.amax(1).tolist()  # [CLS] and the words, without [SEP]
        return cross_entropies(TAUS[2] * image @ report.T) + local_loss(regions, t, counts)


class Head(nn.Sequential):
    def __init__(self, inputs: int, heads: Any):
        norm = nn.BatchNorm1d(heads.width, affine=False)
        first = nn.Linear(inputs, heads.hidden), nn.BatchNorm1d(heads.hidden), nn.ReLU()
        super().__init__(*first, nn.Linear(heads.hidden, heads.width), norm)

    def forward(self, x):
        y = F.normalize(super().forward(x.flatten(0, -2)), dim=-1)
        return y.view(*x.shape[:-1], y.shape[-1])


class Mgca(nn.Module):
    def __init__(self, vocab: int, config: Any):
        super().__init__()
        self.image, self.text = resnet(config.image), bert(vocab, config.text, "eager")
        features, text = 32 * config.image.width, config.text.width
        sizes = {"image": features, "report": text, "region": features // 2, "word": text}
        self.heads = nn.ModuleDict({k: Head(size, config.heads) for k, size in sizes.items()})
        start = torch.randn(config.heads.prototypes, config.heads.width)
        self.prototypes = nn.Parameter(F.normalize(start, dim=1))

    def forward(self, images, ids, mask, words):
        layer3, _, pooled = self.image(images)
        out = self.text(ids, mask, output_attentions=True)
        pieces, looks = out.last_hidden_state, out.attentions[-1][:, :, 0].mean(1)
        image, report = self.heads["image"](pooled), self.heads["report"](pieces[:, 0])
        regions = self.heads["region"](layer3.flatten(2).transpose(1, 2))
        t = self.heads["word"](by_word(pieces, words)[:, 1:])
        real = torch.arange(t.shape[1], device=t.device)[None] < words.amax(1)[:, None]
        weights = _clipped(by_word(looks[..., None], words)[:, 1:, 0].detach(), real)
        even = torch.full(regions.shape[:2], 1 / regions.shape[1], device=t.device)
        loss = cross_entropies(image @ report.T / 0.07)
        loss = loss + token_loss(t, regions, real, weights, even)
        return loss + prototype_loss(image @ self.prototypes.T, report @ self.prototypes.T)


def token_loss(t, regions, real, of_word, of_region) -> torch.Tensor:
    """MGCA's token loss of weighted words [b, w, d] and regions [b, r, d] of unit norm."""
    scores = t @ regions.transpose(1, 2) / 0.1
    masked = scores.masked_fill(~real[..., None], -1e9)
    of_words = F.normalize(scores.softmax(2) @ regions, dim=-1)
    of_regions = F.normalize(masked.softmax(1).transpose(1, 2) @ t, dim=-1)
    everywhere = torch.ones_like(of_region, dtype=torch.bool)
    words = _alignment(t, of_words, real, of_word)
    return words + _alignment(regions, of_regions, everywhere, of_region)


def _clipped(looks: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    kept = torch.where(real & (looks != 0), looks.float(), torch.nan)
    low, high = (kept.nanquantile(q, 1, keepdim=True) for q in (0.1, 0.9))
    kept = kept.clamp(low, high).nan_to_num(0.0)
    return kept / kept.sum(1, keepdim=True)


def _alignment(x, gathered, real, weights):
    logits = x @ gathered.transpose(1, 2) / 0.1
    masked = logits.masked_fill(~real[:, None], -1e9), logits.masked_fill(~real[..., None], -1e9)
    own = logits.diagonal(dim1=1, dim2=2)
    losses = [(m.logsumexp(d) - own) for m, d in zip(masked, (2, 1), strict=True)]
    return ((losses[0] + losses[1]) / 2 * weights).sum(1).mean()


def prototype_loss(image: torch.Tensor, report: torch.Tensor) -> torch.Tensor:
    """MGCA's prototype loss of the scores [b, k] of images and reports with the prototypes."""

    def code(scores: torch.Tensor) -> torch.Tensor:
        q = (scores.detach() / 0.05).exp().T
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / q.shape[0]
            q = q / q.sum(0, keepdim=True) / q.shape[1]
        return (q * q.shape[1]).T

    return (
        F.cross_entropy(report / 0.2, code(image)) + F.cross_entropy(image / 0.2, code(report))
    ) / 2


METHODS = {"convirt": Convirt, "gloria": Gloria, "mgca": Mgca}


def step_of(module: nn.Module, forward: Callable, inputs: tuple, bf16: bool) -> Callable:
    """A function that runs one step on the device of the inputs and waits for the result."""
    module.train()
    optimizer = torch.optim.AdamW(
        module.parameters(), 1e-5, betas=(0.9, 0.999), weight_decay=0.05, fused=True
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=bf16):
            loss = forward(module, *inputs)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def method_step(
    name: str, config: Any, batch: dict, device: str | torch.device = "cpu", *, bf16: bool
) -> Callable:
    """A training step of a method on images, ids, mask and words in NumPy. On a GPU encoders are
    compiled; losses are not, since they take a new shape for each report."""
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
    texts = (torch.from_numpy(batch[k]).long().to(device) for k in ("ids", "mask", "words"))
    inputs = images.to(device, memory_format=torch.channels_last), *texts
    with torch.device(device):
        module = METHODS[name](VOCABULARY, config).to(memory_format=torch.channels_last)
    if torch.device(device).type == "cuda":
        module.image.compile()
        module.text.compile()
    return step_of(module, lambda m, *inputs: m(*inputs), inputs, bf16)
