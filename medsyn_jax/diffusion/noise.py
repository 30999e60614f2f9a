"""The noise schedule that a model was trained on, from a `scheduler_config.json` of diffusers."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from medsyn_jax.core.errors import UserError

FILE = "scheduler_config.json"
_MOST_TIMES, _LEAST = 100_000, 1e-30  # training times; share of the image in the noisiest latent
# Defaults of beta_schedule, beta_start and beta_end by class of diffusers, less "Scheduler".
_CLASSES = {
    ("linear", 1e-4, 0.02): "DDIM DDIMInverse DDIMParallel DDPM DDPMParallel DEISMultistep "
    "DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep EulerAncestralDiscrete "
    "EulerDiscrete LMSDiscrete PNDM SASolver UniPCMultistep",
    ("linear", 0.00085, 0.012): "DPMSolverSDE HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete",
    ("scaled_linear", 0.00085, 0.012): "LCM TCD",
}
_FIELDS = ("beta_schedule", "beta_start", "beta_end")
_NOISE = {
    f"{name}Scheduler": dict(zip(_FIELDS, noise, strict=True))
    for noise, names in _CLASSES.items()
    for name in names.split()
}


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """float64 [T]: cumulative products of 1 - beta, falling within [0, 1).

    Reads num_train_timesteps, beta_schedule (linear, scaled_linear or squaredcos_cap_v2),
    beta_start, beta_end, trained_betas and rescale_betas_zero_snr (arXiv 2305.08891, Algorithm 1:
    the last product becomes 0); the defaults are those of the class that the file names. Raises
    UserError, also for a class of diffusers that has no such schedule.
    """
    noise, trained = _noise(config), config.get("trained_betas")
    count = option(config, "num_train_timesteps", 1000)
    whole_number("num_train_timesteps", count, least=1)
    fields = "beta_start, beta_end" if trained is None else "trained_betas"
    try:
        with np.errstate(all="ignore"):
            betas = _betas(noise, count) if trained is None else np.asarray(trained, np.float64)
        sound = betas.shape == (count,) and bool(((betas > 0) & (betas < 1)).all())
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound or np.iscomplexobj(betas):
        raise UserError(f"{FILE}: {fields}: must give {count} numbers between 0 and 1")
    alphas = np.cumprod(1 - betas)
    if not (alphas[-1] > _LEAST and np.diff(alphas, prepend=1.0).max() < 0):
        raise UserError(
            f"{FILE}: {fields}: add so {'much' if alphas[-1] <= _LEAST else 'little'} noise that "
            "nothing could be trained on it: copy the whole file of the model"
        )
    if option(config, "rescale_betas_zero_snr", False):
        root = np.sqrt(alphas)
        alphas = np.square((root - root[-1]) * (root[0] / (root[0] - root[-1])))
    return alphas


def _betas(noise: Mapping[str, Any], count: int) -> np.ndarray:
    kind, start, end = noise["beta_schedule"], noise["beta_start"], noise["beta_end"]
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    if kind == "squaredcos_cap_v2":
        angle = (np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2
        kept = np.cos(angle) ** 2
        return np.minimum(1 - kept[1:] / kept[:-1], 0.999)
    refuse("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))


def _noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """beta_schedule, beta_start and beta_end; None where trained betas make them unnecessary."""
    name = config.get("_class_name")
    fields = {field: config[field] for field in _FIELDS if config.get(field) is not None}
    defaults = _NOISE.get(name) if isinstance(name, str) else None
    if defaults is None and isinstance(name, str) and not re.search("Flow|EDM|CogVideoX", name):
        complete = len(fields) == len(_FIELDS) or config.get("trained_betas") is not None
        defaults = dict.fromkeys(_FIELDS) if complete else None
    if defaults is None:
        raise UserError(
            f"{FILE}: _class_name: {name!r} is not supported without {', '.join(_FIELDS)}, nor any "
            "scheduler of flow matching or EDM: use a pipeline that was trained on such a schedule"
        )
    return defaults | fields


def option(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field of the file, or the default where it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def whole_number(name: str, value: Any, least: int) -> None:
    """Raise UserError for a field that is not a whole number from `least` to _MOST_TIMES."""
    if type(value) is not int or not least <= value <= _MOST_TIMES:
        raise UserError(
            f"{FILE}: {name}: {value!r} is not a whole number from {least} to {_MOST_TIMES}"
        )


def refuse(name: str, value: Any, values: tuple) -> NoReturn:
    """Raise UserError for a field whose value is not among the supported ones."""
    choice = " or ".join(map(str, values)) or "null"
    raise UserError(f"{FILE}: {name}: {value!r} is not supported: use {choice}")
