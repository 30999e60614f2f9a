"""What the figures of a study show and what they do not, in sentences made from its cells."""

from collections.abc import Sequence

from medsyn_jax.tables.cells import Part, Value, as_text, label

_START = ("none", "random")


def sentences(parts: Sequence[Part]) -> list[str]:
    """Of each task with most of the labels, then of what limits all of them."""
    said = [f"{part.task}, {part.head[-1]} of the labels. {_of_task(part)}" for part in parts]
    seeds = max((v.seeds for part in parts for _, row in part.rows for v in row if v), default=0)
    if seeds == 1:
        said.append("One seed gives no interval: nothing here tells a difference from chance.")
    elif seeds:
        said.append(
            f"{seeds} seeds are few: a tie says that they cannot tell a difference from 0, and is "
            "no proof that two encoders are equal. Each interval stands by itself: of twenty "
            "differences that are truly 0, about one would not be called a tie."
        )
    if is_phantom(parts):
        said.append(
            "The images called real are those of the phantom, which a program draws: the figures "
            "show that the experiment runs, and say nothing of patients."
        )
    return said


def is_phantom(parts: Sequence[Part]) -> bool:
    """Whether every cell says that the real images are those of the phantom."""
    return {e.get("source", "") for part in parts for e in part.entries.values()} == {"phantom"}


def _of_task(part: Part) -> str:
    fraction = part.fractions[-1]

    def clause(arms: tuple[str, str], more: str, less: str) -> str:
        values = [(m, part.difference(m, arms, fraction)) for m in part.methods]
        words = [f"{m} {_judged(v, more, less)}" for m, v in values if v]
        return f"{arms[0].capitalize()} minus {arms[1]}: {'; '.join(words)}." if words else ""

    clauses = (
        clause(("synthetic", "real"), "synthetic images do better", "synthetic images do worse"),
        clause(
            ("mixed", "duplicated"),
            "mixing gains more than the real set twice",
            "mixing gains less than the real set twice",
        ),
        _against_start(part, fraction),
    )
    return " ".join(c for c in clauses if c) or "Too few cells are finished to compare arms."


def _judged(value: Value, more: str, less: str) -> str:
    """A difference with its interval and in words."""
    figure = as_text(value, signed=True).removesuffix(" =")
    if value.interval is None:
        return f"{figure} (no interval)"
    return f"{figure} ({'a tie' if value.tie else more if value.mean > 0 else less})"


def _against_start(part: Part, fraction: float) -> str:
    """How many pre-trained encoders are better than an untrained one."""
    gaps = {
        encoder: gap
        for encoder in part.encoders
        if encoder[0] != "none" and (gap := part.gap(encoder, _START, fraction))
    }
    if not gaps or all(gap.interval is None for gap in gaps.values()):
        return ""
    better = [encoder for encoder, gap in gaps.items() if not gap.tie and gap.mean > 0]
    if not better:
        return (
            f"None of the {len(gaps)} pre-trained encoders beats the untrained start, so that a "
            "comparison of their arms means little."
        )
    rest = "; ".join(label(encoder) for encoder in gaps if encoder not in better)
    return (
        f"{len(better)} of {len(gaps)} pre-trained encoders beat the untrained start"
        f"{f' (not {rest})' if rest else ''}."
    )
