"""Convert a torch checkpoint into a safetensors file, without running code of the checkpoint.

    python scripts/to_safetensors.py IN.pth OUT.safetensors

Prints the number of tensors and the keys that were left out. torch reads the file with
`weights_only=True`, which runs no code: other objects that a trainer saved beside the weights (its
arguments, an optimizer, NumPy numbers) are read as empty objects.
"""

import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file

from medsyn_jax.core.files import replaced

# Keys under which trainers save weights; of teacher and student the teacher is published.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "teacher", "module", "net")
BESIDE = re.compile("optim|sched|scaler|rng|args|config|hyper|callback", re.IGNORECASE)
COPY = re.compile("student|ema|momentum", re.IGNORECASE)  # used if there is nothing else


class EmptyDict:
    """Stands for an unknown object of the file that is filled like a dictionary."""

    def __new__(cls, *_, **__) -> Any:
        return OrderedDict()


class Empty:
    """Stands for any other unknown object."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read(source: Path) -> Any:
    """The content of the file, with stand-ins for all but tensors and Python's own containers."""
    try:
        return _read(source, lambda name: Empty if name.startswith("numpy") else EmptyDict)
    except (UnpicklingError, TypeError, ValueError):
        return _read(source, lambda name: Empty)


def _read(source: Path, stand_in: Callable[[str], Callable]) -> Any:
    names: set[str] = set()
    while True:
        stand_ins: list[Any] = [(stand_in(name), name) for name in sorted(names)]
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(source, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if unknown is None or unknown[1] in names:
                raise
            names |= {unknown[1], f"builtins.{unknown[1]}"}  # torch omits "builtins."


def find(state: Any, where: str = "") -> tuple[str, Mapping] | None:
    """(place, tensors) of the model in a checkpoint; None if there is none.

    Raises ValueError if the checkpoint holds several models.
    """
    if not isinstance(state, Mapping):
        return None
    for key in WRAPPERS:
        if model := find(state.get(key), f"{where}{key}/"):
            return model
    inner = [key for key in state if isinstance(key, str) and not BESIDE.search(key)]
    # A loss or a count has no dimension and is no model.
    own = any(isinstance(value, torch.Tensor) and value.ndim for value in state.values())
    for copies in (False, True):
        some = [key for key in inner if bool(COPY.search(key)) == copies]
        models = [model for key in some if (model := find(state[key], f"{where}{key}/"))]
        models += [(where, state)] if own else []
        if len(models) > 1:
            names = ", ".join(name or "the tensors beside" for name, _ in models)
            raise ValueError(f"holds several models: {names}")
        if models:
            return models[0]
    return None


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy; 8-bit floats as float32, which every reader of safetensors knows."""
    tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    tensor = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return tensor.clone().contiguous()


def main(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        if file.read(10)[8:9] == b"{":
            raise ValueError("is already a safetensors file")
    state = read(source)
    model = find(state)
    if model is None:
        keys = ", ".join(map(str, list(state)[:8])) if isinstance(state, Mapping) else ""
        raise ValueError(
            f"holds no dictionary of tensors ({keys or type(state).__name__}): save the "
            "model's state_dict()"
        )
    where, weights = model
    tensors = {str(k): plain(v) for k, v in weights.items() if isinstance(v, torch.Tensor)}
    with replaced(target) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    odd = [str(key) for key, value in weights.items() if not isinstance(value, torch.Tensor)]
    beside = [str(key) for key in state if where and f"{key}/" != where[: len(str(key)) + 1]]
    left = f", left out: {', '.join(odd + beside)}" if odd + beside else ""
    print(f"{target}: {len(tensors)} tensors{f' of {where[:-1]}' if where else ''}{left}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    warnings.simplefilter("ignore")  # torch's advice to writers of files
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # torch raises errors of many kinds for a damaged file
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        if "weights_only" in said.split("\n")[0]:  # torch's advice would run code of the file
            said = "torch cannot read it without running its code: save the model's state_dict()"
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        sys.exit(f"error: {sys.argv[1]}: {kind}{said.split(chr(10))[0][:200]}")
