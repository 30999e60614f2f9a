import numpy as np
import pytest

from medsyn_jax.core.errors import UserError
from medsyn_jax.diffusion import noise
from medsyn_jax.diffusion.schedule import alphas_cumprod, make_table
from tests.diffusion import toy

MEAN, STD = 0.7, 0.4


def run(table, x, model):
    """The recurrence that the module states, in float64, for one number x."""
    x = x * float(table.init_sigma)
    last, history = 0.0, [0.0] * (table.steps.mix.shape[-1] - 3)
    for _, sigma, scale, entry, mix in zip(*table.steps, strict=True):
        entries = [entry @ [x, model(scale * x, float(sigma))], *history]
        x, last = mix.astype(np.float64) @ [x, last, *entries]
        history = entries[:-1]
    return x


def gaussian_error(sampler, steps, prediction="epsilon", **fields):
    """Where x = 1.3 ends, less where it should for data of the distribution N(MEAN, STD^2).

    The exact denoiser is known, and the probability flow keeps a point where it is in standard
    deviations of the noised data.
    """
    config = toy.SD15 | {"prediction_type": prediction, "timestep_spacing": "trailing", **fields}

    def model(x, sigma):
        a = 1 / (1 + sigma**2)
        noise = (x - np.sqrt(a) * MEAN) * np.sqrt(1 - a) / (a * STD**2 + 1 - a)
        return noise if prediction == "epsilon" else (noise - np.sqrt(1 - a) * x) / np.sqrt(a)

    end, *_, start = alphas_cumprod(config)
    euler = sampler == "euler"  # its state is x / sqrt(a)
    x = 1.3 * (np.sqrt(1 - start) if euler else 1)
    deviations = (x - np.sqrt(start) * MEAN) / np.sqrt(start * STD**2 + 1 - start)
    wanted = np.sqrt(end) * MEAN + deviations * np.sqrt(end * STD**2 + 1 - end)
    return abs(run(make_table(sampler, config, steps), 1.3, model) * np.sqrt(end) ** euler - wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("dpm++2m", 2), ("unipc", 3)])
def test_order_of_convergence(sampler, order, prediction):
    fields = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    coarse, fine = (gaussian_error(sampler, n, prediction, **fields) for n in (40, 80))
    assert order - 0.15 < np.log2(coarse / fine) < order + 0.15
    assert fine < 0.02


def test_ddim_is_of_first_order_and_pndm_better():
    ddim = [gaussian_error("ddim", n) for n in (50, 100)]
    assert 0.85 < np.log2(ddim[0] / ddim[1]) < 1.15
    assert gaussian_error("pndm", 100) < ddim[1] / 8
    # As in diffusers, PNDM adds up v of several times as if they were of one: no gain in order.
    assert gaussian_error("pndm", 100, "v_prediction") < ddim[1]


def test_one_step_of_ddim_by_hand():
    config = toy.SD15 | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    a = alphas_cumprod(config)[-1]
    got = run(make_table("ddim", config, 1), 1.3, lambda x, sigma: 0.2)
    assert got == pytest.approx((1.3 - np.sqrt(1 - a) * 0.2) / np.sqrt(a), rel=1e-6)


def test_pndm_evaluates_its_second_time_twice():
    times = make_table("pndm", toy.SD15, 50).steps.time
    assert times.dtype == np.float32
    assert times[:4].tolist() == [981, 961, 961, 941]
    assert len(times) == 51
    assert times[-1] == 1


def test_cumulative_products():
    plain = alphas_cumprod(toy.SD15)
    assert plain.dtype == np.float64
    assert plain[0] == pytest.approx(1 - 0.00085)
    assert plain[-1] == pytest.approx(0.00466, rel=1e-3)  # published: SNR 0.068265^2
    zero = alphas_cumprod(toy.ZERO_SNR)
    assert zero[-1] == 0
    assert zero[0] == pytest.approx(plain[0])
    assert (np.diff(zero) < 0).all()


@pytest.mark.parametrize(
    ("sampler", "change", "field"),
    [
        ("heun", {}, "sampler: 'heun'"),
        ("ddim", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name"),
        ("ddim", {"_class_name": None}, "_class_name"),
        ("ddim", {"prediction_type": "sample"}, "prediction_type"),
        ("ddim", {"clip_sample": True}, "clip_sample"),
        ("ddim", {"timestep_spacing": "uniform"}, "timestep_spacing"),
        ("ddim", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("ddim", {"beta_end": "big"}, "beta_end"),
        ("ddim", {"beta_end": 2.0}, "beta_end"),
        ("ddim", {"trained_betas": [0.1]}, "trained_betas"),
        ("ddim", {"num_train_timesteps": 0}, "num_train_timesteps"),
        ("ddim", {"steps_offset": -1}, "steps_offset"),
        ("ddim", {"rescale_betas_zero_snr": True}, "prediction_type"),
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps"),
        ("pndm", {"skip_prk_steps": None}, "skip_prk_steps"),
        ("pndm", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas"),
        ("euler", {"final_sigmas_type": "one"}, "final_sigmas_type"),
        ("dpm++2m", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("dpm++2m", {"solver_order": 3}, "solver_order"),
        ("dpm++2m", {"thresholding": True}, "thresholding"),
        ("unipc", {"solver_type": "bh1"}, "solver_type"),
        ("unipc", {"lower_order_final": False}, "lower_order_final"),
    ],
)
def test_what_is_not_built_is_refused_by_name(sampler, change, field):
    with pytest.raises(UserError) as caught:
        make_table(sampler, toy.SD15 | change, 20)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"num_train_timesteps": 10**11},
            "num_train_timesteps: 100000000000 is not a whole number",
        ),
        ({"num_train_timesteps": True}, "num_train_timesteps: True"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps: 1000.0"),
        ({"beta_start": -0.1}, "beta_start, beta_end: must give 1000 numbers between 0 and 1"),
        ({"beta_start": float("nan")}, "beta_start, beta_end: must give 1000"),
        ({"beta_end": float("inf")}, "beta_start, beta_end: must give 1000"),
        ({"beta_start": 10**400}, "beta_start, beta_end: must give 1000"),
        ({"beta_start": 0.5, "beta_end": 0.9}, "beta_start, beta_end: add so much noise"),
        ({"beta_start": 1e-40, "beta_end": 1e-40}, "beta_start, beta_end: add so little noise"),
        ({"trained_betas": [[0.1]] * 1000}, "trained_betas: must give 1000"),
        ({"beta_schedule": ["linear"]}, r"beta_schedule: \['linear'\] is not supported"),
        ({"_class_name": ["PNDMScheduler"]}, "_class_name"),
        ({"_class_name": "EDMEulerScheduler"}, "_class_name"),
        ({"_class_name": "OwnScheduler", "beta_start": None}, "_class_name: 'OwnScheduler'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "_class_name"),  # it shifts what betas give
        ({"use_karras_sigmas": "yes"}, "use_karras_sigmas"),
        ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr"),
        ({"steps_offset": True}, "steps_offset"),
        ({"steps_offset": 10**30}, "steps_offset"),
    ],
)
def test_senseless_values_are_refused(change, says):
    for sampler in toy.CLASSES:
        with pytest.raises(UserError, match=says):
            make_table(sampler, toy.SD15 | change, 20)


def test_the_class_does_not_matter_where_the_fields_give_the_noise():
    for sampler in toy.CLASSES:
        wanted = make_table(sampler, toy.SD15, 20)
        for name in [*noise._NOISE, "SomeoneElsesScheduler"]:
            got = make_table(sampler, toy.SD15 | {"_class_name": name}, 20)
            for a, b in zip(
                (got.init_sigma, *got.steps), (wanted.init_sigma, *wanted.steps), strict=True
            ):
                np.testing.assert_array_equal(a, b)
    # What the file leaves out is that class's own.
    heun, lcm = (alphas_cumprod({"_class_name": f"{n}Scheduler"}) for n in ("HeunDiscrete", "LCM"))
    assert heun[[0, 1]] == pytest.approx(np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))[[0, 1]])
    np.testing.assert_array_equal(lcm, alphas_cumprod(toy.SD15))
    ddim = alphas_cumprod({"_class_name": "DDIMScheduler"})
    assert ddim[-1] == pytest.approx(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))


def test_files_of_2022_have_an_offset_of_1():
    old = {field: value for field, value in toy.SD15.items() if field != "steps_offset"}
    assert make_table("pndm", old, 20).steps.time[[0, -1]].tolist() == [951, 1]
    assert make_table("ddim", old, 20).steps.time[[0, -1]].tolist() == [951, 1]
    assert make_table("ddim", old | {"steps_offset": 0}, 20).steps.time[-1] == 0


@pytest.mark.parametrize("steps", [0, 1001, 1000])
def test_steps_that_do_not_fit_are_refused(steps):
    with pytest.raises(UserError, match="sampler steps"):
        make_table("dpm++2m", toy.SD15 | {"timestep_spacing": "leading"}, steps)
    with pytest.raises(UserError, match="sampler steps"):
        make_table("ddim", toy.SD15, steps)
