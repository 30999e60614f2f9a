"""Checks of a config: each task declares a table of rules, `CHECKS`, and `main` runs them first.

A rule is a function of the config that raises UserError. Rules on single fields are made by
`numbers`, `choice`, `choices`, `ranges`, `texts` and `files`; a rule on several fields is a plain
function.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError

Rule = Callable[[Any], None]
DTYPES = ("float32", "bfloat16")
_MOST, _LEAST, _LARGEST = 2**31, 1e-37, 3e38  # limits of int32 and float32
# Kind of a number -> test, noun and wording; a tuple must hold such numbers only.
_KINDS = {
    "above 0": (lambda x: x > 0, "number", "above 0"),
    "from 0": (lambda x: x >= 0, "number", "of 0 or more"),
    "below 1": (lambda x: 0 <= x < 1, "number", "below 1, and not below 0"),
    "share": (lambda x: 0 <= x <= 1, "share", "from 0 to 1"),
    "part": (lambda x: 0 < x <= 1, "share", "above 0 and at most 1"),
    "count": (lambda x: x > 0 and isinstance(x, int), "whole number", "above 0"),
}


def run(rules: Sequence[Rule], config: Any) -> None:
    """Raise UserError for a number that 32 bits cannot hold, or the first rule that is broken."""
    _check_finite(config, "config")
    for rule in rules:
        rule(config)


def numbers(kind: str, section: str, names: str) -> Rule:
    """A rule on fields that hold a number or a tuple of numbers.

    Args:
        kind: "above 0", "from 0", "below 1", "share" (0 to 1), "part" (above 0 to 1), or "count".
        section: of the fields, such as "data"; "" for fields outside sections.
        names: of the fields, separated by spaces. A name that ends in "?" is checked only where
            the section has the field.
    """
    fits, noun, wording = _KINDS[kind]

    def rule(config: Any) -> None:
        for field, value in _fields(config, section, names):
            several = isinstance(value, tuple | list)
            values = value if several else [value]
            if not values or not all(is_number(x) and fits(x) for x in values):
                wanted = f"{noun}s" if several else f"a {noun}"
                raise UserError(f"config.{field}: {value!r}: give {wanted} {wording}")

    return rule


def choice(field: str, allowed: Collection[Any]) -> Rule:
    """A rule on a field that holds one of `allowed`."""
    return lambda config: check_choice(field, _value(config, field), allowed)


def choices(field: str, allowed: Collection[Any]) -> Rule:
    """A rule on a field that holds a tuple of some of `allowed`."""

    def rule(config: Any) -> None:
        for value in _value(config, field):
            check_choice(field, value, allowed)

    return rule


def ranges(section: str, names: str) -> Rule:
    """A rule on fields that hold two numbers, the lower one first."""

    def rule(config: Any) -> None:
        for field, value in _fields(config, section, names):
            pair = isinstance(value, tuple | list) and len(value) == 2
            if not pair or not all(map(is_number, value)) or value[0] > value[1]:
                raise UserError(
                    f"config.{field}: {value!r}: give two numbers, the lower one first, such as "
                    "(0.8, 1.0)"
                )

    return rule


def texts(section: str, names: str) -> Rule:
    """A rule on fields that hold a tuple of texts."""

    def rule(config: Any) -> None:
        for field, value in _fields(config, section, names):
            sound = isinstance(value, tuple | list) and all(isinstance(x, str) for x in value)
            if not sound:
                raise UserError(
                    f"config.{field}: {value!r}: give texts, such as ('one', 'another')"
                )

    return rule


def files(paths: Callable[[Any], Mapping[str, str]]) -> Rule:
    """A rule that the files and folders of `paths(config)`, field -> path or "", exist."""
    return lambda config: check_files(paths(config))


def is_number(value: Any) -> bool:
    """Whether devices can compute with `value`: an int of 32 bits, or a finite float that float32
    does not round to 0. Booleans are no numbers."""
    if isinstance(value, float):
        return value == 0 or _LEAST <= abs(value) <= _LARGEST
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST


def check_choice(field: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise UserError if `value` is not one of `allowed`."""
    if value not in allowed:
        raise UserError(
            f"config.{field}: {value!r} is unknown: choose from {', '.join(map(str, allowed))}"
        )


def check_files(paths: Mapping[str, str]) -> None:
    """Raise UserError with all missing files and folders of `paths`, field -> path or ""."""
    missing = [
        f"config.{field} {path!r} (looked at {Path(path).absolute()})"
        for field, path in paths.items()
        if path and not _exists(path)
    ]
    if missing:
        raise UserError(
            f"missing: {'; '.join(missing)}: see docs/data.md for where each comes from"
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
    """(full name, value) of the fields in `names`."""
    found = []
    for name in names.split():
        field = f"{section}.{name}".strip(".")
        if not name.endswith("?"):
            found.append((field, _value(config, field)))
        elif name[:-1] in (_value(config, section) if section else config):
            found.append((field[:-1], _value(config, field[:-1])))
    return found


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
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        return False
