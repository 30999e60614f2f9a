"""What can be wrong with a config, each in one line, before any work is done."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError

_MOST, _LEAST, _LARGEST = 2**31, 1e-37, 3e38  # what int32 and float32 hold
# Kind of a field -> what its number must be (alike for each number of a tuple), and in words.
_KINDS = {
    "above_0": (lambda x: x > 0, "number", "above 0"),
    "from_0": (lambda x: x >= 0, "number", "of 0 or more"),
    "below_1": (lambda x: 0 <= x < 1, "number", "below 1, and not below 0"),
    "shares": (lambda x: 0 <= x <= 1, "share", "from 0 to 1"),
    "parts": (lambda x: 0 < x <= 1, "share", "above 0 and at most 1"),
    "counts": (lambda x: x > 0 and isinstance(x, int), "whole number", "above 0"),
}


def check_numbers(
    config: Any,
    above_0: Iterable[str] = (),
    from_0: Iterable[str] = (),
    **others: Iterable[str],
) -> None:
    """UserError for the first number that cannot be meant.

    config: sections of fields, all numbers of which must be such as `is_number` says.
    above_0, from_0, others ("below_1", "shares" from 0 to 1, "parts" of a whole, "counts"): fields
    ("train.epochs") whose number, or each number of whose tuple, must be of that kind.
    """
    for kind, fields in {"above_0": above_0, "from_0": from_0, **others}.items():
        fits, noun, what = _KINDS[kind]
        for field in fields:
            value = _value(config, field)
            several = isinstance(value, tuple | list)
            numbers = value if several else [value]
            if not numbers or not all(is_number(x) and fits(x) for x in numbers):
                wanted = f"{noun}s" if several else f"a {noun}"
                raise UserError(f"config.{field}: {value!r}: give {wanted} {what}")
    _check_all(config, "config")


def is_number(value: Any) -> bool:
    """Whether devices can count with `value`: whole in 32 bits, or finite in fp32 and not 0 there
    unless it is. True and False are no numbers."""
    if isinstance(value, float):
        return value == 0 or _LEAST <= abs(value) <= _LARGEST
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST


def _check_all(value: Any, name: str) -> None:
    if isinstance(value, int | float):
        if not is_number(value) and not isinstance(value, bool):
            raise UserError(f"{name}: {value}: give a finite number that 32 bits can hold")
    elif isinstance(value, tuple | list):
        for part in value:
            _check_all(part, name)
    elif hasattr(value, "items"):
        for key, part in value.items():
            _check_all(part, f"{name}.{key}")


def check_ranges(config: Any, fields: Iterable[str]) -> None:
    """UserError for the first of these fields that is not two numbers, the lower one first."""
    for field in fields:
        value = _value(config, field)
        pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(is_number, value))
        if not pair or value[0] > value[1]:
            raise UserError(
                f"config.{field}: {value!r}: give two numbers, the lower one first, such as "
                "(0.8, 1.0)"
            )


def check_texts(config: Any, fields: Iterable[str]) -> None:
    """UserError for the first of these fields whose tuple holds anything but text."""
    for field in fields:
        value = _value(config, field)
        if not isinstance(value, tuple | list) or not all(isinstance(x, str) for x in value):
            raise UserError(f"config.{field}: {value!r}: give texts, such as ('one', 'another')")


def _value(config: Any, field: str) -> Any:
    value = config
    for name in field.split("."):
        if not hasattr(value, "items") or name not in value:
            raise UserError(
                f"config.{field}: is missing: use a config of configs/ that was made for this task"
            )
        value = value[name]
    return value


def check_choice(field: str, value: Any, known: Collection[Any]) -> None:
    """UserError if `value` is none of `known`."""
    if value not in known:
        raise UserError(
            f"config.{field}: {value!r} is unknown: choose from {', '.join(map(str, known))}"
        )


def check_files(named: Mapping[str, str]) -> None:
    """UserError with every file or folder of `named` (field -> path, or "") that is not there."""
    missing = [
        f"config.{field} {path!r} (looked at {Path(path).absolute()})"
        for field, path in named.items()
        if path and not _exists(path)
    ]
    if missing:
        raise UserError(
            f"missing: {'; '.join(missing)}: see docs/data.md for where each comes from"
        )


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a NUL
        return False
