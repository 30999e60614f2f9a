"""Checks of a config: each task declares a table of rules, `CHECKS`, and `main` runs them first.

A rule is a function of the config that raises UserError. `numbers`, `choice`, `choices`, `ranges`,
`texts` and `files` make rules on single fields; a rule on several fields is a plain function.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError

Rule = Callable[[Any], None]
DTYPES = ("float32", "bfloat16")
_MOST, _LEAST, _LARGEST = 2**31, 1e-37, 3e38  # limits of int32 and float32
# Kind of a number -> test, noun and wording of its rule.
_KINDS = {
    "above 0": (lambda x: x > 0, "number", "above 0"),
    "from 0": (lambda x: x >= 0, "number", "of 0 or more"),
    "below 1": (lambda x: 0 <= x < 1, "number", "below 1, and not below 0"),
    "share": (lambda x: 0 <= x <= 1, "share", "from 0 to 1"),
    "part": (lambda x: 0 < x <= 1, "share", "above 0 and at most 1"),
    "count": (lambda x: x > 0 and isinstance(x, int), "whole number", "above 0"),
}


def run(rules: Sequence[Rule], config: Any) -> None:
    """Raise UserError for a number that 32 bits cannot hold, or for the first broken rule."""
    _check_finite(config, "config")
    for rule in rules:
        rule(config)


def numbers(kind: str, section: str, names: str) -> Rule:
    """A rule on fields that hold a number or a tuple of numbers.

    Args:
        kind: "above 0", "from 0", "below 1", "share" (0 to 1), "part" (above 0 to 1), or "count".
        section: of the fields, such as "data"; "" for fields outside sections.
        names: of the fields, separated by spaces. A name that ends in "?" is optional.
    """
    fits, noun, wording = _KINDS[kind]

    def rule(config: Any) -> None:
        for field, value in _fields(config, section, names):
            several = isinstance(value, tuple | list)
            values = value if several else [value]
            if not values or not all(is_number(x) and fits(x) for x in values):
                kinds = f"{noun}s" if several else f"a {noun}"
                raise UserError(f"config.{field}: {value!r}: give {kinds} {wording}")

    return rule


def choice(field: str, allowed: Collection[Any]) -> Rule:
    """A rule on a field that holds one of `allowed`."""
    return lambda config: _check_choice(field, _value(config, field), allowed)


def choices(field: str, allowed: Collection[Any]) -> Rule:
    """A rule on a field that holds a tuple of some of `allowed`."""

    def rule(config: Any) -> None:
        for value in _value(config, field):
            _check_choice(field, value, allowed)

    return rule


def ranges(section: str, names: str) -> Rule:
    """A rule on fields that hold two numbers, the lower one first."""

    def fits(value: Any) -> bool:
        return len(value) == 2 and all(map(is_number, value)) and value[0] <= value[1]

    return _tuples(section, names, fits, "two numbers, the lower one first, such as (0.8, 1.0)")


def texts(section: str, names: str) -> Rule:
    """A rule on fields that hold a tuple of texts."""

    def fits(value: Any) -> bool:
        return all(isinstance(x, str) for x in value)

    return _tuples(section, names, fits, "texts, such as ('one', 'another')")


def _tuples(section: str, names: str, fits: Callable[[Any], bool], wording: str) -> Rule:
    """A rule on fields that hold a tuple that `fits`."""

    def rule(config: Any) -> None:
        for field, value in _fields(config, section, names):
            if not isinstance(value, tuple | list) or not fits(value):
                raise UserError(f"config.{field}: {value!r}: give {wording}")

    return rule


def files(paths: Callable[[Any], Mapping[str, str]]) -> Rule:
    """A rule that the files and folders of `paths(config)`, field -> path or "", exist."""

    def rule(config: Any) -> None:
        missing = [
            f"config.{field} {path!r} (looked at {Path(path).absolute()})"
            for field, path in paths(config).items()
            if path and not _exists(path)
        ]
        if missing:
            raise UserError(
                f"missing: {'; '.join(missing)}: see docs/data.md for where each comes from"
            )

    return rule


def is_number(value: Any) -> bool:
    """Whether devices can compute with `value`.

    True for an int of 32 bits or a finite float that float32 does not round to 0, not for a bool.
    """
    if isinstance(value, float):
        return value == 0 or _LEAST <= abs(value) <= _LARGEST
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST


def _check_choice(field: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed:
        raise UserError(
            f"config.{field}: {value!r} is unknown: choose from {', '.join(map(str, allowed))}"
        )


def _check_finite(value: Any, name: str) -> None:
    if isinstance(value, int | float):
        if not is_number(value) and not isinstance(value, bool):
            raise UserError(f"{name}: {value}: give a finite number that 32 bits can hold")
    elif isinstance(value, tuple | list):
        for part in value:
            _check_finite(part, name)
    elif hasattr(value, "items"):
        for key, part in value.items():
            _check_finite(part, f"{name}.{key}")


def _fields(config: Any, section: str, names: str) -> list[tuple[str, Any]]:
    """(full name, value) of the fields in `names`, without optional ones that the config lacks."""
    fields = []
    for name in names.split():
        field = f"{section}.{name.removesuffix('?')}".strip(".")
        if not name.endswith("?") or name[:-1] in (_value(config, section) if section else config):
            fields.append((field, _value(config, field)))
    return fields


def _value(config: Any, field: str) -> Any:
    value = config
    for name in field.split("."):
        if not hasattr(value, "items") or name not in value:
            raise UserError(
                f"config.{field}: is missing: use a config of configs/ that was made for this task"
            )
        value = value[name]
    return value


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # no valid name of a file: too long, or with a NUL
        return False
