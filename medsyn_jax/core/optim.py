"""AdamW with warm-up and cosine decay, clipping, decay mask and frozen layers, all by rules."""

import re
from typing import Any

import jax
import optax

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError

# Weight decay is for matrices: not for biases, normalisation scales, positions or token types.
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
) -> optax.GradientTransformation:
    """AdamW for the tree `params` (arrays or shapes).

    clip: global norm over the trained leaves, 0 for none. frozen: regexes over whole names; those
    leaves stay as they are and hold no optimizer state. Raises UserError if a frozen rule is no
    regex or matches nothing, or if nothing is left to train.
    """
    names = tree.named(params)
    for pattern in frozen:
        try:
            compiled = re.compile(pattern)
        except re.error as e:
            raise UserError(f"config.optim.frozen: {pattern!r} is no regex: {e}") from None
        if not any(compiled.fullmatch(name) for name in names):
            raise UserError(f"config.optim.frozen: {pattern!r} matches no parameter")
    rules = [*((pattern, "frozen") for pattern in frozen), (".*", "trained")]
    labels = tree.map_rules(rules, params)
    if "trained" not in jax.tree.leaves(labels):
        raise UserError("config.optim.frozen: every parameter is frozen, so nothing would train")
    trained = optax.chain(
        optax.clip_by_global_norm(clip) if clip > 0 else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, lambda p: tree.map_rules(decay, p)),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)
