"""Turns a torch checkpoint into a safetensors file: to_safetensors.py IN.pth OUT.safetensors

torch reads it with `weights_only=True`, which runs no code from the file.
"""

import sys

import torch
from safetensors.torch import save_file


def main(source: str, target: str) -> None:
    state = torch.load(source, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):  # as trainers, and DeiT and MAE, wrap them
        state = state.get(key, state)
    tensors = {key: value.clone().contiguous() for key, value in state.items()}
    save_file(tensors, target, metadata={"format": "pt"})
    print(f"{target}: {len(tensors)} tensors")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
