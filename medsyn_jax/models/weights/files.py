"""Reading safetensors files: a single file, a sharded one, or a folder that holds either."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from medsyn_jax.core.errors import UserError

Tensors = dict[str, np.ndarray]
_DTYPES = "F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL"


def read(path: Path) -> Tensors:
    """All tensors of a file, of a sharded file, or of a folder that holds one of them.

    Raises UserError that says what is wrong with the file. A pickle is never loaded.
    """
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise UserError(f"weights: {path}: no such file or folder")
    if path.suffix != ".json":
        return _read_file(path)
    shard_of = read_object(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(x, str) for x in shard_of.values()):
        raise UserError(f"weights: {path}: not an index of safetensors shards")
    tensors: Tensors = {}
    for name in sorted(set(shard_of.values())):
        shard = path.parent / name
        if not os.path.isfile(shard):  # Path.is_file raises for names that no file can have
            where = path.parent / shorter(name)
            raise UserError(f"weights: {where}: named in {path.name} but not there")
        part = _read_file(shard)
        listed = {key for key, value in shard_of.items() if value == name}
        if odd := sorted(listed ^ part.keys()):
            keys = ", ".join(map(shorter, odd[:4]))
            raise UserError(f"weights: {shard}: {path.name} says otherwise about: {keys}")
        tensors |= part
    return tensors


def read_object(path: Path, subject: str = "weights", advice: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, which begins with `subject`, for anything else.

    advice: what to do about a missing file.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{subject}: {path}: no such file: {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else shorter(str(error))
        raise UserError(f"{subject}: {path}: cannot be read as JSON: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{subject}: {path}: must hold one JSON object")
    return content


def shorter(name: str) -> str:
    """A name from a file as at most 100 printable characters, for a message of one line."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 100 else f"{name[:97]}..."


def _in_folder(folder: Path) -> Path:
    for stem in ("model", "diffusion_pytorch_model"):
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if (folder / name).is_file():
                return folder / name
    indices = sorted(folder.glob("*.safetensors*.json"))
    if len(indices) == 1:  # of a variant such as fp16
        return indices[0]
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise UserError(f"weights: {folder}: holds {len(paths)} .safetensors files, name one")
    for pickle in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*")):
        raise _pickle_error(pickle)
    raise UserError(f"weights: {folder}: no .safetensors file in this folder")


def _pickle_error(path: Path) -> UserError:
    out = path.with_suffix(".safetensors")
    return UserError(
        f"weights: {path}: a pickle, which could run code and is never loaded: "
        f"convert it with `python scripts/to_safetensors.py {path} {out}` and give {out}"
    )


def _read_file(path: Path) -> Tensors:
    try:
        with safe_open(path, "np") as file:
            dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            if odd := next((key for key in dtypes if dtypes[key] not in _DTYPES.split()), None):
                raise UserError(
                    f"weights: {path}: {shorter(odd)} is of type {dtypes[odd]}, which is not read: "
                    "use a file in float32, float16 or bfloat16"
                )
            return {key: file.get_tensor(key) for key in dtypes}
    except SafetensorError as error:
        with path.open("rb") as file:
            head = file.read(2)
        # torch writes a zip of pickles; old torch and other programs a bare pickle of protocol 2-5.
        pickled = head == b"PK" or (head[:1] == b"\x80" and 2 <= head[-1] <= 5)
        if pickled or path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"):
            raise _pickle_error(path) from error
        raise UserError(
            f"weights: {path}: not a whole safetensors file: {shorter(str(error))}"
        ) from error
    except OSError as error:
        raise UserError(f"weights: {path}: cannot be read: {error}") from error
