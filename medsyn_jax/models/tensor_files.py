"""Reading safetensors files: a single one, one in shards, or a folder that holds either."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from medsyn_jax.core.errors import UserError

Tensors = dict[str, np.ndarray]


def read(path: Path) -> Tensors:
    """All tensors of a file, of a sharded file, or of a folder that has one of them.

    Raises UserError that says what is wrong with the file; a pickle is never loaded.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise UserError(f"weights: {path}: no such file or folder")
    if path.suffix != ".json":
        return _read_file(path)
    try:
        parts: dict[str, str] = json.loads(path.read_text())["weight_map"]
        names = sorted(set(parts.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"weights: {path}: not an index of safetensors shards") from error
    tensors: Tensors = {}
    for name in names:
        shard = path.parent / name
        if not shard.is_file():
            raise UserError(f"weights: {shard}: named in {path.name} but not there")
        found = _read_file(shard)
        listed = {key for key, value in parts.items() if value == name}
        if listed ^ found.keys():
            odd = ", ".join(sorted(listed ^ found.keys())[:4])
            raise UserError(f"weights: {shard}: {path.name} says otherwise about: {odd}")
        tensors |= found
    return tensors


def _in_folder(folder: Path) -> Path:
    for stem in ("model", "diffusion_pytorch_model"):
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (folder / name).is_file():
                return folder / name
    if len(found := sorted(folder.glob("*.safetensors*.json"))) == 1:  # of a variant such as fp16
        return found[0]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"weights: {folder}: holds {len(found)} .safetensors files, name one")
    for pickle in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
        raise UserError(_is_pickle(pickle))
    raise UserError(f"weights: {folder}: no .safetensors file in this folder")


def _is_pickle(path: Path) -> str:
    out = path.with_suffix(".safetensors")
    return (
        f"weights: {path}: a pickle, which could run code and is never loaded: "
        f"convert it with `python scripts/to_safetensors.py {path} {out}` and give {out}"
    )


def _read_file(path: Path) -> Tensors:
    try:
        with safe_open(path, "np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        with path.open("rb") as file:
            head = file.read(2)
        # torch writes a zip of pickles; older torch and others a bare pickle of protocol 2 or more.
        pickled = head == b"PK" or (head[:1] == b"\x80" and 2 <= head[-1] <= 5)
        if pickled or path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
            raise UserError(_is_pickle(path)) from error
        raise UserError(f"weights: {path}: not a whole safetensors file: {error}") from error
    except OSError as error:
        raise UserError(f"weights: {path}: cannot be read: {error}") from error
