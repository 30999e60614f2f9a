import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.core import mesh as meshes
from medsyn_jax.objectives.mgca import cls_weights, mgca_loss, sinkhorn
from tests.objectives.test_contrastive import reference as instance_reference

SETTINGS = {"temperature": 0.07, "token_temperature": 0.1, "prototype_temperature": 0.2}
SETTINGS |= {"epsilon": 0.05, "iterations": 3, "mask_padding": True}
SETTINGS |= {"instance_weight": 1.0, "token_weight": 0.7, "prototype_weight": 0.5}
LEARNED = ("image", "text", "words", "patches", "prototypes")


def inputs(lengths, w=4, p=3, d=5, e=3, k=4, seed=0):
    """Everything that `mgca_loss` takes, for reports of so many words each."""
    rng = np.random.default_rng(seed)
    b = len(lengths)
    shapes = {"image": (b, d), "text": (b, d), "words": (b, w, e), "patches": (b, p, e)}
    made = {name: 3 * rng.normal(size=shape) for name, shape in shapes.items()}
    prototypes = rng.normal(size=(k, d))
    made["prototypes"] = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    made |= {"word_weights": rng.random((b, w)), "patch_weights": rng.random((b, p))}
    made = {name: x.astype(np.float32) for name, x in made.items()}
    return made | {"word_mask": np.arange(w) < np.array(lengths)[:, None]}


def unit(x):
    return np.array([row / np.linalg.norm(row) for row in x])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def one_way(x, y, seen, told, weights, t):
    """One report's or image's loss: its positions x attend to those positions of y that are seen,
    and the positions told find themselves among what they and the others of them gathered."""
    gathered = []
    for n in range(len(x)):
        a = softmax(np.array([x[n] @ y[m] / t for m in seen]))
        gathered.append(sum(share * y[m] for share, m in zip(a, seen, strict=True)))
    o = unit(gathered)
    total = 0.0
    for n in told:
        own = x[n] @ o[n] / t
        over_m = np.log(sum(np.exp(x[n] @ o[m] / t) for m in told)) - own
        over_n = np.log(sum(np.exp(x[m] @ o[n] / t) for m in told)) - own
        total += weights[n] * (over_m + over_n) / 2
    return total


def token_reference(words, patches, mask, word_weights, patch_weights, t, mask_padding):
    word = patch = 0.0
    for i in range(len(words)):
        x, y, real = unit(words[i]), unit(patches[i]), np.flatnonzero(mask[i])
        if not len(real):
            continue
        told = real if mask_padding else range(len(x))
        word += one_way(x, y, range(len(y)), told, word_weights[i] * mask[i], t) / len(words)
        patch += one_way(y, x, real, range(len(y)), patch_weights[i], t) / len(words)
    return word, patch


def sinkhorn_reference(scores, epsilon, iterations):
    q = np.exp(scores.astype(np.float64) / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        for k in range(len(q)):
            q[k] *= 1 / len(q) / q[k].sum()
        for b in range(q.shape[1]):
            q[:, b] *= 1 / q.shape[1] / q[:, b].sum()
    return (q / q.sum(0)).T


def prototype_reference(image, text, prototypes, codes):
    total = 0.0
    for x, wanted in ((text, codes[0]), (image, codes[1])):
        for row, code in zip(unit(x), wanted, strict=True):
            total -= sum(code * np.log(softmax(prototypes @ row / 0.2))) / len(x) / 2
    return total


def reference(made, codes, mask_padding):
    word, patch = token_reference(
        *(made[k] for k in ("words", "patches", "word_mask", "word_weights", "patch_weights")),
        0.1,
        mask_padding,
    )
    prototype = prototype_reference(made["image"], made["text"], made["prototypes"], codes)
    instance = instance_reference(made["image"], made["text"], 0.07, 1.0, 1.0)
    return instance + 0.7 * (word + patch) + 0.5 * prototype, (word, patch, prototype)


def codes_of(made):
    """Of the image and of the text, held fixed while the arrays are nudged: no gradient is due."""
    return [
        sinkhorn_reference(unit(made[part]) @ made["prototypes"].T, 0.05, 3)
        for part in ("image", "text")
    ]


def slopes(f, x):
    """Central differences in float64."""
    found = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        ends = []
        for h in (1e-6, -1e-6):
            nudged = x.copy()
            nudged[index] += h
            ends.append(f(nudged))
        found[index] = (ends[0] - ends[1]) / 2e-6
    return found


def value_and_grad(made, **changed):
    def f(learned, rest):
        return mgca_loss(**learned, **rest, **(SETTINGS | changed))

    learned = {name: made[name] for name in LEARNED}
    rest = {name: made[name] for name in made.keys() - learned.keys()}
    return jax.jit(jax.value_and_grad(f, has_aux=True))(learned, rest)


def check_gradients(got, wanted):
    floor = 1e-2 * max(np.linalg.norm(x) for x in wanted.values())
    for name, x in wanted.items():
        error = np.linalg.norm(np.asarray(got[name], np.float64) - x)
        assert error <= 1e-5 * max(np.linalg.norm(x), floor), name


CASES = {
    "every length": inputs([4, 1, 2, 0]),
    "one pair": inputs([3]),
    "identical rows": {k: np.repeat(v, 3, 0) for k, v in inputs([3], k=1).items()}
    | {"prototypes": inputs([3])["prototypes"]},
    "constant patches": inputs([4, 2]) | {"patches": np.ones((2, 3, 3), np.float32)},
}


@pytest.mark.parametrize(
    ("case", "mask_padding"), [*((case, True) for case in CASES), ("every length", False)]
)
def test_losses_and_gradients_against_float64_loops(case, mask_padding):
    made = CASES[case]
    (loss, metrics), grads = value_and_grad(made, mask_padding=mask_padding)
    exact = {k: v if v.dtype == bool else v.astype(np.float64) for k, v in made.items()}
    codes = codes_of(exact)
    wanted, parts = reference(exact, codes, mask_padding)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    got = [metrics[name] for name in ("word", "patch", "prototype")]
    np.testing.assert_allclose(got, parts, rtol=1e-5, atol=1e-6)
    due = {
        name: slopes(lambda x, n=name: reference(exact | {n: x}, codes, mask_padding)[0], value)
        for name, value in exact.items()
        if name in LEARNED
    }
    check_gradients(grads, due)
    if mask_padding:
        assert not np.asarray(grads["words"])[~made["word_mask"]].any()


@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_codes_equal_the_plain_iterations_also_where_float32_would_overflow(epsilon):
    scores = np.random.default_rng(1).uniform(-1, 1, (6, 5)).astype(np.float32)
    scores[0, 0] = 1.0  # exp(1 / .01) is beyond float32

    def first(scores):
        codes = sinkhorn(scores, epsilon=epsilon)
        return codes[0, 0], codes

    (_, codes), slope = jax.jit(jax.value_and_grad(first, has_aux=True))(scores)
    np.testing.assert_allclose(codes, sinkhorn_reference(scores, epsilon, 3), rtol=1e-5, atol=1e-6)
    assert not slope.any()


def test_cls_weights_clip_the_non_zero_entries_of_each_row():
    rng = np.random.default_rng(2)
    attention = rng.random((5, 2, 9)).astype(np.float32) ** 3
    attention[3, :, 4] = 0  # a word that no head looks at stays out of the quantiles
    mask = np.arange(9) < np.array([9, 1, 2, 7, 0])[:, None]
    wanted = np.zeros((5, 9))
    for i in range(4):
        mean = attention[i].astype(np.float64).mean(0)
        counted = np.flatnonzero(mask[i] & (mean != 0))
        low, high = np.quantile(mean[counted], [0.1, 0.9])
        wanted[i, counted] = mean[counted].clip(low, high)
        wanted[i] /= wanted[i].sum()

    def first(attention, mask):
        weights = cls_weights(attention, mask)
        return weights[0, 0], weights

    (_, got), slope = jax.jit(jax.value_and_grad(first, has_aux=True))(attention, mask)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert not slope.any()


def test_eight_devices_give_the_loss_and_gradients_of_one():
    made = inputs([*range(5), 4, 1, 2] * 2)
    made["attention"] = np.random.default_rng(3).random((16, 2, 4)).astype(np.float32)
    names = [name for name in made if name not in ("prototypes", "word_weights")]

    @jax.jit
    def f(prototypes, arrays):
        def loss(learned):
            weights = cls_weights(arrays["attention"], arrays["word_mask"])
            rest = {k: v for k, v in arrays.items() if k not in (*learned, "attention")}
            return mgca_loss(**learned, **rest, word_weights=weights, **SETTINGS)

        learned = {name: arrays[name] for name in LEARNED if name != "prototypes"}
        return jax.value_and_grad(loss, has_aux=True)(learned | {"prototypes": prototypes})

    mesh = meshes.make_mesh()
    assert mesh.size == 8
    results = []
    for whole, split in (
        (meshes.replicated(mesh), meshes.batch_sharding(mesh)),
        (jax.devices()[0], jax.devices()[0]),
    ):
        arrays = {name: jax.device_put(made[name], split) for name in names}
        results.append(jax.device_get(f(jax.device_put(made["prototypes"], whole), arrays)))
    ((many, parts), grads), ((one, parts_of_one), grads_of_one) = results
    np.testing.assert_allclose(many, one, rtol=1e-5)
    for name, value in parts_of_one.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    check_gradients(grads, grads_of_one)


def test_bfloat16_is_computed_in_float32_and_nan_shows():
    made = inputs([4, 2])
    rough = made | {name: jnp.asarray(made[name], jnp.bfloat16) for name in LEARNED}
    exact = made | {name: np.asarray(rough[name], np.float32) for name in LEARNED}
    f = jax.jit(lambda made: mgca_loss(**made, **SETTINGS)[0])
    loss = f(rough)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, f(exact), rtol=1e-6)
    for name in LEARNED:
        broken = exact | {name: exact[name].copy()}
        broken[name].flat[0] = np.nan
        assert np.isnan(f(broken)), name


@pytest.mark.parametrize(
    "name", ["temperature", "token_temperature", "prototype_temperature", "epsilon"]
)
@pytest.mark.parametrize("value", [0.0, -0.1, float("nan")])
def test_a_temperature_must_be_positive(name, value):
    with pytest.raises(ValueError, match=name.split("_")[-1]):
        jax.eval_shape(lambda made: mgca_loss(**made, **(SETTINGS | {name: value})), inputs([2]))


def test_one_prototype_is_too_few():
    with pytest.raises(ValueError, match="prototypes: 1"):
        jax.eval_shape(lambda made: mgca_loss(**made, **SETTINGS), inputs([2], k=1))
