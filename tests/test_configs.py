"""Every experiment config and variant as text, so that no change of a value goes unseen.

To renew them after a change that was meant: `python -m tests.test_configs`, and read the diff.
"""

import importlib
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from medsyn_jax.main import TASKS

GOLDEN = Path(__file__).parent / "golden" / "configs"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in ("common", "__init__"))


def load(name: str):
    return importlib.import_module(f"configs.{name}")


CASES = [(name, variant) for name in NAMES for variant in load(name).VARIANTS]


def flat(config: ConfigDict, prefix: str = "") -> list[str]:
    """Sorted lines `a.b.c = value`."""
    found = []
    for key, value in sorted(config.items()):
        if isinstance(value, ConfigDict) and len(value):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key} = {value!r}")
    return found


def text(name: str, variant: str) -> str:
    return "\n".join(flat(load(name).get_config(variant))) + "\n"


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_config_is_as_it_was(name, variant):
    path = GOLDEN / f"{name}-{variant}.txt"
    assert path.exists(), "run `python -m tests.test_configs` and look at what it wrote"
    assert text(name, variant) == path.read_text()


def test_no_golden_file_is_left_of_a_config_that_is_gone():
    assert {p.stem for p in GOLDEN.iterdir()} == {f"{n}-{v}" for n, v in CASES}


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_has_the_three_variants_and_refuses_others(name):
    module = load(name)
    assert {"demo", "smoke", "paper"} <= set(module.VARIANTS)
    assert flat(module.get_config()) == flat(module.get_config("demo"))
    with pytest.raises(ValueError, match="variant 'other' is unknown: choose from demo, smoke"):
        module.get_config("other")


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_config_comes_back_from_json(name, variant):
    """config.json is compared with the config of the next start: it must hold all of it."""
    config = load(name).get_config(variant)
    back = ConfigDict(json.loads(config.to_json()))
    assert [line.split(" = ")[0] for line in flat(back)] == [
        line.split(" = ")[0] for line in flat(config)
    ]
    assert config.task in TASKS


def renew() -> None:
    for path in GOLDEN.glob("*.txt"):
        path.unlink()
    for name, variant in CASES:
        (GOLDEN / f"{name}-{variant}.txt").write_text(text(name, variant))


if __name__ == "__main__":
    renew()
