"""AdamW with warm-up, cosine decay, clipping, and rules for decay and for frozen parameters."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError

# Only matrices decay: not biases, normalisation scales, positions or token types.
DECAY_RULES: tree.Rules = (
    (r".*/(position|type)/table", False),
    (r".*(kernel|table)", True),
    (r".*", False),
)


def warmup_cosine(peak: float, steps: int, warmup: int, end: float = 0.0) -> optax.Schedule:
    """Linear from 0 to `peak` over `warmup` steps, then cosine to `end` at step `steps`."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), end
    )


def adamw(
    params: Any,
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    decay: tree.Rules = DECAY_RULES,
    frozen: tuple[str, ...] = (),
    held: tuple[str, ...] = (),
    held_steps: int = 0,
    unit_rows: tuple[str, ...] = (),
) -> optax.GradientTransformation:
    """AdamW for the tree `params` (arrays or shapes).

    clip: global norm over the trained leaves, 0 for none. frozen: regexes over whole names; these
    leaves never change and have no optimizer state. held: regexes of leaves that do not change in
    the first `held_steps`. unit_rows: regexes of matrices whose rows have unit L2 norm after every
    update. Raises UserError if such a rule is no regex or matches nothing, or if every leaf is
    frozen.
    """
    names = tree.named(params)
    for field, rules in {"frozen": frozen, "held": held, "unit_rows": unit_rows}.items():
        _check_rules(field, rules, names)
    rules = [*((pattern, "frozen") for pattern in frozen), (".*", "trained")]
    labels = tree.map_rules(rules, params)
    if "trained" not in jax.tree.leaves(labels):
        raise UserError("config.optim.frozen: every parameter is frozen, so nothing would train")
    moved = optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, lambda p: tree.map_rules(decay, p)),
    )

    def released(step: Any, **_: Any) -> jax.Array:
        return jnp.asarray(step) >= held_steps

    def from_release(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.conditionally_mask(inner, released)

    if held:  # their moments, and Adam's bias correction, begin at the release

        def kinds(p: Any) -> Any:
            return tree.map_rules([*((pattern, "held") for pattern in held), (".*", "free")], p)

        silent = optax.partition(
            {"free": optax.identity(), "held": from_release(optax.identity())}, kinds
        )
        moved = optax.partition({"free": moved, "held": from_release(moved)}, kinds)
    trained = optax.chain(
        silent if held else optax.identity(),
        optax.clip_by_global_norm(clip) if clip > 0 else optax.identity(),
        moved,
        optax.scale_by_learning_rate(schedule),
    )
    tx = optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
    return optax.chain(tx, _unit_rows(unit_rows)) if unit_rows else tx


def _check_rules(field: str, rules: tuple[str, ...], names: Any) -> None:
    for pattern in rules:
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError, OverflowError, RecursionError) as e:  # no text, a huge count
            raise UserError(f"config.optim.{field}: {pattern!r} is no regex: {e}") from None
        if not any(compiled.fullmatch(name) for name in names):
            raise UserError(f"config.optim.{field}: {pattern!r} matches no parameter")


def _unit_rows(rules: tuple[str, ...]) -> optax.GradientTransformation:
    """Changes the updates of matching matrices so that their new rows have unit norm."""
    marks = [*((pattern, True) for pattern in rules), (".*", False)]

    def projected(u: jax.Array, p: jax.Array, mark: bool) -> jax.Array:
        if not mark:
            return u
        x = p + u
        length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
        return x / jnp.maximum(length, 1e-12) - p

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(projected, updates, params, tree.map_rules(marks, updates))

    return optax.stateless(update)
