"""Samplers as tables of coefficients, made from a `scheduler_config.json` of diffusers.

Every sampler here is a linear multistep method. In step i the output o(x_i, t_i) of the model gives
an entry

    e_i = entry[0] x_i + entry[1] o

(the output itself, or the x_0 that it stands for), and then

    x_{i+1}  = mix[0] . (x_i, last_i, e_i, e_{i-1}, ...)
    last_{i+1} = mix[1] . (x_i, last_i, e_i, e_{i-1}, ...)

where `last` is a second state that the next step may need (PNDM goes back to it; UniPC corrects x_i
before it goes on). A new sampler is one function that fills such a table, and its line in
`_SAMPLERS`. Tables are computed in float64 on the host and handed over in float32.

The rules for times and for the fields of the file are those of diffusers 0.42. The class that the
file names gives the defaults of the noise schedule (noise.py), which the model was trained on; any
other field that is left out has the default of the sampler, as with
`OtherScheduler.from_config(scheduler.config)`. Only `steps_offset` is 1 then, as diffusers' Stable
Diffusion pipelines set it for files of 2022.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from medsyn_jax.core.errors import UserError
from medsyn_jax.diffusion.noise import FILE, alphas_cumprod, option, refuse, whole_number

Options = Mapping[str, Any]

# Fields that mean something else in this class than in the class of a sampler here.
_MISNAMED = {
    "DPMSolverSinglestepScheduler": "lower_order_final",
    "SASolverScheduler": "algorithm_type",
}


def _fields(values: tuple, names: str) -> dict[str, tuple]:
    return dict.fromkeys(names.split(), values)


# The supported values of each field that would change the samples; () allows null alone.
_EVERYWHERE = {
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "use_flow_sigmas": (False,),
    **_fields((True, False), "rescale_betas_zero_snr set_alpha_to_one use_karras_sigmas"),
}
_SIGMAS = {
    **_fields((False,), "use_exponential_sigmas use_beta_sigmas"),
    **_fields((), "sigma_min sigma_max"),
}
_SOLVERS = {
    **_SIGMAS,
    **_fields((False,), "thresholding use_dynamic_shifting"),
    "solver_order": (2,),
    "lower_order_final": (True,),
    "shift_terminal": (),
}


class Steps(NamedTuple):
    """The inputs of the sampler in each of its s steps; float32, axis 0 has length s."""

    time: np.ndarray  # [s] where the model is evaluated, 0 to T - 1; fractional for Euler
    sigma: np.ndarray  # [s] noise level there, sqrt((1 - a) / a) of the cumulative product a
    scale: np.ndarray  # [s] of the model's input: o = model(scale x, time)
    entry: np.ndarray  # [s, 2] weights of x and o in the entry
    mix: np.ndarray  # [s, 2, 2 + k] weights of x, last and the k latest entries, newest first


class Table(NamedTuple):
    """A sampler over a number of steps."""

    init_sigma: np.ndarray  # [] standard deviation of the noise that it starts from
    steps: Steps


class Sampler(NamedTuple):
    """Makes a table from options, cumulative products and a number of steps."""

    table: Callable[[Options, np.ndarray, int], Table]
    supported: dict[str, tuple]  # beside _EVERYWHERE
    defaults: Mapping[str, Any] = {"timestep_spacing": "linspace", "set_alpha_to_one": False}


def make_table(sampler: str, config: Mapping[str, Any], steps: int) -> Table:
    """The table of `sampler` ("ddim", "pndm", "euler", "dpm++2m" or "unipc").

    config: the content of a `scheduler_config.json` of any class whose fields give the noise
    schedule. steps: of the sampler; PNDM evaluates the model once more, because it does its second
    step twice.
    Raises UserError if the sampler is unknown, `steps` is out of range, or a field of the file has
    a value that is not supported.
    Sources: DDIM arXiv 2010.02502 eq. 12 with eta 0; PNDM 2202.09778 eq. 9 and the linear multistep
    coefficients of its Algorithm 2; Euler 2206.00364; DPM-Solver++(2M) 2211.01095 Algorithm 2;
    UniPC 2302.04867 with B(h) = e^h - 1, order 2.
    """
    if sampler not in _SAMPLERS:
        raise UserError(f"sampler: {sampler!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    alphas = alphas_cumprod(config)
    options = _options(sampler, config)
    if not 1 <= steps <= len(alphas):
        raise UserError(f"sampler steps: {steps} is not a number from 1 to {len(alphas)}")
    if options["rescale_betas_zero_snr"] and options["prediction_type"] == "epsilon":
        raise UserError(
            f"{FILE}: prediction_type: epsilon says nothing of the image at zero signal-to-noise "
            f"ratio: set rescale_betas_zero_snr to false, or use v_prediction"
        )
    table = _SAMPLERS[sampler].table(options, alphas, steps)
    single = [np.asarray(a, np.float32) for a in (table.init_sigma, *table.steps)]
    return Table(single[0], Steps(*single[1:]))


def _options(sampler: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that tables depend on; UserError for a value that is not supported."""
    name = config["_class_name"]
    config = {field: value for field, value in config.items() if field != _MISNAMED.get(name)}
    for field, values in {**_EVERYWHERE, **_SAMPLERS[sampler].supported}.items():
        value = config.get(field)
        if value is not None and value not in values:
            refuse(field, value, values)
    if sampler == "pndm" and name == "PNDMScheduler" and not config.get("skip_prk_steps"):
        refuse("skip_prk_steps", False, (True,))
    defaults = {
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
        "use_karras_sigmas": False,
        **_SAMPLERS[sampler].defaults,
    }
    options = {name: option(config, name, default) for name, default in defaults.items()}
    whole_number("steps_offset", options["steps_offset"], least=0)
    return options


def _times(options: Options, count: int, steps: int, points: int) -> np.ndarray:
    """[steps] falling times within 0 .. count - 1 (arXiv 2305.08891, table 2), not yet rounded.

    points: of the grid whose first `steps` are taken; the solvers of higher order leave out its end
    (time 0).
    """
    spacing = options["timestep_spacing"]
    if spacing == "linspace":
        times = np.linspace(0, count - 1, points)[::-1][:steps]
    elif spacing == "leading":
        times = (np.arange(points) * (count // points))[::-1][:steps] + options["steps_offset"]
    else:
        times = np.round(np.arange(count, 0, -count / steps))[:steps] - 1
    if times[0] > count - 1 or (np.diff(times.round()) >= 0).any():
        raise UserError(
            f"sampler steps: {steps} with timestep_spacing {spacing} and steps_offset "
            f"{options['steps_offset']} do not fit the {count} training steps: use fewer"
        )
    return times


def _predictions(prediction: str, keep: Any, add: Any) -> tuple[np.ndarray, np.ndarray]:
    """x_0 and the noise as weights of (x, output), [..., 2] each, for x = keep x_0 + add noise."""
    keep, add = np.asarray(keep), np.asarray(add)
    if prediction == "v_prediction":
        return np.stack([keep, -add], -1), np.stack([add, keep], -1)
    zero = np.zeros_like(keep)
    return np.stack([1 / keep, -add / keep], -1), np.stack([zero, zero + 1], -1)


def _sigmas(alphas: np.ndarray) -> np.ndarray:
    """Noise levels of all training times; 4096, as in diffusers, for the infinite level of a
    zero-SNR schedule."""
    alphas = np.append(alphas[:-1], alphas[-1] or 2.0**-24)
    return np.sqrt((1 - alphas) / alphas)


def _before(options: Options, alphas: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The products at `times`; a time below 0 is beyond the schedule's clean end."""
    end = 1.0 if options["set_alpha_to_one"] else alphas[0]
    return np.where(times >= 0, alphas[times], end)


def _plain_mix(steps: int, entries: int) -> np.ndarray:
    """Weights that keep x and pass it on as `last`."""
    mix = np.zeros((steps, 2, 2 + entries))
    mix[:, :, 0] = 1
    return mix


def _table(
    times: np.ndarray,
    sigma: np.ndarray,
    mix: np.ndarray,
    *,
    entry: Any = (0.0, 1.0),
    scale: Any = 1.0,
    init_sigma: Any = 1.0,
) -> Table:
    """By default entries are outputs, and neither the model's input nor the noise is scaled."""
    scales, entries = np.broadcast_to(scale, len(times)), np.broadcast_to(entry, (len(times), 2))
    return Table(np.asarray(init_sigma), Steps(times, sigma, scales, entries, mix))


def _ddim(options: Options, alphas: np.ndarray, steps: int) -> Table:
    times = _times(options, len(alphas), steps, steps).round().astype(int)
    # As in diffusers, the stride is that of "leading", whatever the spacing of the times.
    here, there = alphas[times], _before(options, alphas, times - len(alphas) // steps)
    x0, noise = _predictions(options["prediction_type"], np.sqrt(here), np.sqrt(1 - here))
    mix = _plain_mix(steps, 1)
    mix[:, 0, [0, 2]] = np.sqrt(there)[:, None] * x0 + np.sqrt(1 - there)[:, None] * noise
    return _table(times, _sigmas(alphas)[times], mix)


def _pndm(options: Options, alphas: np.ndarray, steps: int) -> Table:
    times = _times(options, len(alphas), steps, steps).round().astype(int)
    times = np.insert(times, 1, times[1]) if steps > 1 else times
    stride = len(alphas) // steps
    start, goal = times.copy(), times - stride
    if steps > 1:  # the second evaluation redoes the first step from its start
        start[1], goal[1] = times[1] + stride, times[1]
    here, there = alphas[start], _before(options, alphas, goal)
    _, noise = _predictions(options["prediction_type"], np.sqrt(here), np.sqrt(1 - here))
    on_x = np.sqrt(there / here)
    # eq. 9
    on_noise = (here - there) / (here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there))
    # Adams-Bashforth weights, newest first; the second evaluation is not used again.
    orders = [[1], [1 / 2, 1 / 2], [3 / 2, 0, -1 / 2], [23 / 12, -16 / 12, 0, 5 / 12]]
    orders += [[55 / 24, -59 / 24, 37 / 24, 0, -9 / 24], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    mix = _plain_mix(len(times), 5)
    mix[:, 0] = 0
    for i in range(len(times)):
        weights = np.array(orders[min(i, 5)])
        mix[i, 0, 1 if i == 1 else 0] = on_x[i] + on_noise[i] * noise[i, 0]
        mix[i, 0, 2 : 2 + len(weights)] = on_noise[i] * noise[i, 1] * weights
    return _table(times, _sigmas(alphas)[times], mix)


def _grid(
    options: Options, alphas: np.ndarray, steps: int, *, solver: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Times [steps] and noise levels [steps + 1]; sampling ends at the last level.

    solver: of higher order, with whole times; Euler takes any.
    """
    every = _sigmas(alphas)
    times = _times(options, len(alphas), steps, steps + solver)
    times = times.round() if solver else times
    sigmas = np.interp(times, np.arange(len(every)), every)
    if options["use_karras_sigmas"]:  # arXiv 2206.00364, eq. 5, rho 7
        high, low = (every[-1], every[0]) if solver else (sigmas[0], sigmas[-1])
        sigmas = np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7
        times = np.interp(np.log(sigmas), np.log(every), np.arange(len(every)))
        times = times.round() if solver else times
    end = 0.0 if options["final_sigmas_type"] == "zero" else every[0]
    return times, np.append(sigmas, end)


def _euler(options: Options, alphas: np.ndarray, steps: int) -> Table:
    times, sigmas = _grid(options, alphas, steps, solver=False)
    sigma, move = sigmas[:-1], np.diff(sigmas)
    scale = 1 / np.sqrt(sigma**2 + 1)
    # The state is x_0 + sigma noise: the model's input is scaled, and the noise is the slope.
    _, slope = _predictions(options["prediction_type"], scale, sigma * scale)
    mix = _plain_mix(steps, 1)
    mix[:, 0, 0] += move * slope[:, 0] * scale
    mix[:, 0, 2] = move * slope[:, 1]
    start = np.sqrt(sigma[0] ** 2 + (options["timestep_spacing"] == "leading"))
    return _table(times, sigma, mix, scale=scale, init_sigma=start)


def _advance(sigmas: np.ndarray, i: int, order: int) -> tuple[float, float, float]:
    """Weights of x, e_i and e_{i-1} (values of x_0) in x_{i+1}: DPM-Solver++(2M), midpoint.

    With h the step in log(1 / sigma), e^-h is the ratio of the noise levels.
    """
    here, there = sigmas[i], sigmas[i + 1]
    keep_here, keep_there = 1 / np.sqrt(here**2 + 1), 1 / np.sqrt(there**2 + 1)
    gain = keep_there * (1 - there / here)
    slope = 0.0
    if order == 2:
        slope = 0.5 * gain * np.log(here / there) / np.log(sigmas[i - 1] / here)
    return there * keep_there / (here * keep_here), gain + slope, -slope


def _solver_table(
    options: Options, times: np.ndarray, sigmas: np.ndarray, mix: np.ndarray
) -> Table:
    sigma = sigmas[:-1]
    keep = 1 / np.sqrt(sigma**2 + 1)
    x0, _ = _predictions(options["prediction_type"], keep, sigma * keep)
    return _table(times, sigma, mix, entry=x0)


def _dpm(options: Options, alphas: np.ndarray, steps: int) -> Table:
    times, sigmas = _grid(options, alphas, steps, solver=True)
    mix = _plain_mix(steps, 2)
    for i in range(steps):
        plain_end = i == steps - 1 and (steps < 15 or sigmas[-1] == 0)
        mix[i, 0, [0, 2, 3]] = _advance(sigmas, i, 1 if i == 0 or plain_end else 2)
    return _solver_table(options, times, sigmas, mix)


def _unipc(options: Options, alphas: np.ndarray, steps: int) -> Table:
    times, sigmas = _grid(options, alphas, steps, solver=True)
    mix = np.zeros((steps, 2, 5))
    order = 0
    for i in range(steps):
        corrected = _corrected(sigmas, i, order) if i else np.eye(5)[0]
        order = min(2, i + 1, steps - i)
        on_x, newest, older = _advance(sigmas, i, order)
        mix[i, 0] = on_x * corrected + np.array([0, 0, newest, older, 0])
        mix[i, 1] = corrected
    return _solver_table(options, times, sigmas, mix)


def _corrected(sigmas: np.ndarray, i: int, order: int) -> np.ndarray:
    """UniC: a better x_i from (x_i, last, e_i, e_{i-1}, e_{i-2}); last is the corrected x_{i-1}.

    order: of the step that led to x_i.
    """
    on_last, gain, _ = _advance(sigmas, i - 1, 1)
    h = np.log(sigmas[i - 1] / sigmas[i])
    b = np.expm1(-h)
    if order == 1:
        weights = np.array([0.5, -0.5, 0.0])
    else:
        ratio = np.log(sigmas[i - 1] / sigmas[i - 2]) / h
        phi_2 = b / -h - 1
        phi_3 = phi_2 / -h - 1 / 2
        rho = np.linalg.solve([[1, 1], [ratio, 1]], [phi_2 / b, 2 * phi_3 / b])
        weights = np.array([rho[1], -rho[1] - rho[0] / ratio, rho[0] / ratio])
    return np.array([0, on_last, 0, gain, 0]) + gain * np.array([0, 0, *weights])


_SAMPLERS = {
    "ddim": Sampler(
        _ddim,
        _fields((False,), "clip_sample thresholding"),
        {"timestep_spacing": "leading", "set_alpha_to_one": True},
    ),
    "pndm": Sampler(
        _pndm,
        {"skip_prk_steps": (True,), "rescale_betas_zero_snr": (False,)},
        {"timestep_spacing": "leading", "set_alpha_to_one": False},
    ),
    "euler": Sampler(
        _euler, {"interpolation_type": ("linear",), "timestep_type": ("discrete",), **_SIGMAS}
    ),
    "dpm++2m": Sampler(
        _dpm,
        {
            "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads "deis" so
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # and the last three as midpoint
            **_fields((False,), "euler_at_final use_lu_lambdas"),
            "lambda_min_clipped": (-np.inf,),
            "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
            **_SOLVERS,
        },
    ),
    "unipc": Sampler(
        _unipc,
        {
            "solver_type": ("bh2", "midpoint", "heun", "logrho"),
            "predict_x0": (True,),
            "disable_corrector": ([],),
            "solver_p": (),
            **_SOLVERS,
        },
    ),
}
SAMPLERS = tuple(_SAMPLERS)
