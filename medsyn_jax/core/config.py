"""What can be wrong with a config, each in one line, before any work is done."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError


def check_numbers(config: Any, above_0: Iterable[str] = (), from_0: Iterable[str] = ()) -> None:
    """UserError for the first of these fields ("train.epochs") that is not above 0, or below it."""
    for fields, least in ((above_0, "above 0"), (from_0, "of 0 or more")):
        for field in fields:
            value: Any = config
            for name in field.split("."):
                value = value[name]
            if not (value > 0 or (least != "above 0" and value == 0)):
                raise UserError(f"config.{field}: {value}: give a number {least}")


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
        if path and not Path(path).exists()
    ]
    if missing:
        raise UserError(
            f"missing: {'; '.join(missing)}: see docs/data.md for where each comes from"
        )
