"""Parameter trees by name: 'image/layer1/0/conv1/kernel' -> leaf, and ordered (regex, value) rules.

Sharding, freezing and weight decay are rules over these names; the first rule whose regex matches
the whole name gives the value (as in big_vision).
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

Rules = Sequence[tuple[str, Any]]


def name_of(path: tuple) -> str:
    """A JAX key path as the name that rules see, e.g. "image/layer1/0/conv1/kernel"."""
    parts = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path)
    return "/".join(str(part) for part in parts)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` as a flat dict, name -> leaf, in tree order."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unnamed(flat: dict[str, Any], like: Any) -> Any:
    """The inverse of `named`: a tree of the structure of `like` with the leaves of `flat`.

    Raises KeyError with the names if `flat` does not have exactly these leaves.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [name_of(path) for path, _ in paths]
    if set(names) != set(flat):
        missing, extra = sorted(set(names) - set(flat)), sorted(set(flat) - set(names))
        raise KeyError(f"missing {missing[:5]} ({len(missing)}), extra {extra[:5]} ({len(extra)})")
    return jax.tree_util.tree_unflatten(treedef, [flat[name] for name in names])


def match(rules: Rules, name: str) -> Any:
    """The value of the first rule whose regex matches all of `name`; LookupError if none does."""
    for pattern, value in rules:
        if re.fullmatch(pattern, name):
            return value
    raise LookupError(f"no rule matches {name!r}")


def map_rules(rules: Rules, tree: Any) -> Any:
    """A tree like `tree` whose leaves are the values that `rules` give to their names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: match(rules, name_of(path)), tree)


def size(tree: Any) -> int:
    """The number of elements of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
