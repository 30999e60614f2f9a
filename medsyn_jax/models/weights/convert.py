"""Weights in and out: `safetensors` files in the layouts of other libraries.

An import is a bijection: every key of the file goes to exactly one place, every parameter and
statistic is filled, every shape is equal. An encoder's keys may share one prefix ("bert.",
"module.base_encoder."). Classifiers, pre-training heads and decoders that the layout names are
left out, and the log says so.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import replaced
from medsyn_jax.models.weights import files
from medsyn_jax.models.weights.files import Tensors, shorter
from medsyn_jax.models.weights.layouts import LAYOUTS, Layout, Place, Plan

Tree = dict[str, Any]
_FLOATS = ("float32", "float16", "bfloat16")


def load(
    path: str | Path,
    layout: str | Layout,
    params: Tree,
    stats: Tree,
    *,
    layers: int | None = None,
    dtype: DTypeLike = np.float32,
    report: Callable[[str], None] | None = None,
) -> tuple[Tree, Tree]:
    """The weights of a file in trees like `params` and `stats`, as numpy arrays of `dtype`.

    path: a .safetensors file, the .safetensors.index.json of a sharded one, or their folder.
    layout: a name of LAYOUTS, "" to detect the layout, or a Layout. params, stats: trees of
    anything with a shape. layers: the number of the file's first layers to keep, for a transformer
    with fewer layers than the file. report: gets the lines that name left-out keys; by default the
    log does. Raises UserError that lists missing, extra and misshapen tensors, or says what is
    wrong with the file.
    """
    path = Path(path)
    tensors = files.read(path)
    ours = tree.named(params) | tree.named(stats)
    report = report or logging.getLogger(__name__).info
    plan, chosen, prefix = _best_plan(tensors, layout, ours, path)
    if layers is not None and (beyond := _keys_beyond(tensors, chosen, layers)):
        tensors = {key: value for key, value in tensors.items() if key not in beyond}
        report(f"{path}: left out layers {layers} to {max(beyond.values())}, counted from 0")
    keys = {place.key for place in plan.values()}
    families = {key: _family(key, chosen, prefix) for key in sorted(tensors.keys() - keys)}
    left_out = {key: family for key, family in families.items() if family}
    counters = {_counter(key) for key in keys if key.endswith(".running_var")}
    _check_fit(path, tensors, ours, plan, left_out.keys() | counters)
    if left_out:
        counts = [f"{family}* ({n})" for family, n in Counter(left_out.values()).items()]
        names = map(shorter, left_out if len(left_out) <= 16 else counts)
        report(f"{path}: left out by name: {', '.join(names)}")
    flat = {k: np.ascontiguousarray(_read(tensors, place), dtype) for k, place in plan.items()}
    if odd := [plan[k].key for k, x in flat.items() if not np.isfinite([x.min(), x.max()]).all()]:
        raise UserError(f"weights: {path}: NaN or infinity in {len(odd)}: {shorter(odd[0])}, ...")
    return (
        tree.unnamed({name: flat[name] for name in tree.named(params)}, params),
        tree.unnamed({name: flat[name] for name in tree.named(stats)}, stats),
    )


def save(path: str | Path, layout: str | Layout, params: Tree, stats: Tree) -> None:
    """Write a .safetensors file that torch's `load_state_dict(strict=True)` of `layout` accepts.

    For "hf_vit" that is the module of transformers 4; transformers 5 reads the file by
    `from_pretrained`, which renames its modules. For "hf_bert" it is BertModel without its pooler.
    The file appears only when it is complete. Raises UserError if it cannot be written, or if the
    layout has no name for one of the model's parameters.
    """
    path, ours = Path(path), tree.named(params) | tree.named(stats)
    if path.suffix != ".safetensors":
        raise UserError(f"weights: {path}: the name of the file to write must end in .safetensors")
    layout = _layout(layout)
    plan = layout.plan(ours, layout.prefix)
    if plan is None:
        raise UserError(f"weights: {path}: this layout has no names for this model's parameters")
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, (key, transform) in plan.items():
        leaf = transform.write(np.asarray(jax.device_get(ours[name])))
        parts.setdefault(key, {})[transform.part] = leaf
    tensors = {}
    for key, numbered in parts.items():
        whole = np.concatenate([numbered[part] for part in sorted(numbered)])
        tensors[key] = np.ascontiguousarray(whole)  # safetensors writes the memory as it lies
        if key.endswith(".running_var"):
            tensors[_counter(key)] = np.zeros((), np.int64)
    try:
        with replaced(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights: {path}: cannot be written: {error}") from error


def _layout(name: str | Layout) -> Layout:
    if isinstance(name, Layout):
        return name
    if name not in LAYOUTS:
        raise UserError(f"weights: layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _cuts(key: str) -> Iterator[tuple[str, str]]:
    """The key cut in two before each of its names: ("", "a.b"), ("a.", "b")."""
    yield "", key
    for dot in re.finditer(r"\.", key):
        yield key[: dot.end()], key[dot.end() :]


def _best_plan(
    tensors: Tensors, layout: str | Layout, ours: Tree, path: Path
) -> tuple[Plan, Layout, str]:
    """The plan that shares most keys with the file, its layout, and the prefix of the file's keys.

    The candidates are `layout`, or all layouts if that is "".
    """
    best, best_count = None, -1
    for candidate in [_layout(layout)] if layout else LAYOUTS.values():
        for aliased in (False, True) if candidate.aliases else (False,):
            if (plan := candidate.plan(ours, aliased=aliased)) is None:
                continue
            keys = {place.key for place in plan.values()}
            counts = Counter(a for key in tensors for a, b in _cuts(key) if b in keys)
            heads = {x for x in counts if _family(x, candidate, f"{x}.")}  # a last resort
            prefix = max(counts, key=lambda x: (x not in heads, counts[x], -len(x)), default="")
            if counts[prefix] > best_count:
                best, best_count = (plan, candidate, prefix), counts[prefix]
    if best is None:
        raise UserError(f"weights: {path}: layout {layout or 'any'} does not fit this model")
    plan, candidate, prefix = best
    if "roberta" in prefix:
        raise UserError(f"weights: {path}: {prefix}*: a RoBERTa counts positions otherwise")
    plan = {name: place._replace(key=prefix + place.key) for name, place in plan.items()}
    return plan, candidate, prefix


def _family(key: str, layout: Layout, prefix: str) -> str:
    """The first name, with what precedes it, of a key that `layout` leaves out; "" for other keys.

    The layout's regex is tried after the prefix, or after as much of the prefix as the key has.
    """
    for start, rest in _cuts(key):
        shared = start == prefix if key.startswith(prefix) else prefix.startswith(start)
        if shared and re.fullmatch(layout.left_out, rest):
            return start + re.split(r"(?<=[._])", rest, maxsplit=1)[0]
    return ""


def _keys_beyond(tensors: Tensors, layout: Layout, layers: int) -> dict[str, int]:
    """The keys of layers from number `layers` on, with the number of their layer."""
    matches = {key: re.search(layout.layer, key) for key in tensors}
    numbers = {key: int(match[1]) for key, match in matches.items() if match}
    return {key: number for key, number in numbers.items() if number >= layers}


def _read(tensors: Tensors, place: Place) -> np.ndarray:
    """One of our arrays. A tensor read whole is dropped from `tensors`: a U-Net has 3.4 GB."""
    key, transform = place
    if transform.parts == 1:
        return transform.read(tensors.pop(key))
    return transform.read(np.split(tensors[key], transform.parts)[transform.part])


def _counter(key: str) -> str:
    """The key of torch's count of batches beside a running variance; we write 0."""
    return key.removesuffix("running_var") + "num_batches_tracked"


def _check_fit(path: Path, tensors: Tensors, ours: Tree, plan: Plan, allowed: set[str]) -> None:
    """Raise UserError for missing, extra, misshapen or integer tensors."""
    keys = {place.key for place in plan.values()}
    misshapen, mistyped = [], []
    for name, (key, transform) in plan.items():
        if key not in tensors:
            continue
        shape, wanted = tensors[key].shape, tuple(ours[name].shape)
        whole = transform.write(np.broadcast_to(np.float32(0), wanted)).shape
        if transform.parts > 1:
            whole = (transform.parts * whole[0], *whole[1:])
        if shape != whole:
            misshapen.append(f"{key} {list(shape)} for {name} {list(wanted)}")
        if tensors[key].dtype.name not in _FLOATS:
            mistyped.append(f"{key} {tensors[key].dtype}")
    misfits = {
        "missing": sorted(keys - tensors.keys()),
        "extra": sorted(tensors.keys() - keys - allowed),
        "misshapen": misshapen,
        "neither float32, float16 nor bfloat16": mistyped,
    }
    faults = [
        f"{len(names)} {kind}: {', '.join(map(shorter, names[:4]))}{' ...' * (len(names) > 4)}"
        for kind, names in misfits.items()
        if names
    ]
    if faults:
        raise UserError(f"weights: {path}: does not fit the model: {'; '.join(faults)}")
