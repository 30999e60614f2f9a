"""The cost of reading a report: steps of the patterns, counted by a plain backtracking matcher."""

import functools
import random
import re

import pytest

from medsyn_jax.data.sources import prompts
from medsyn_jax.data.text import heads, reports

_parser, _const = re._parser, re._constants  # pyright: ignore[reportAttributeAccessIssue]
UNITS = [
    *""",.-_()[]{"'5#*@</=?""",
    *("X", "x", "A", "a", "ﬁ", " ", "\t", "\n", "\r\n", "\n \n", "\n- ", ", ", ". ", " ,", " ,5"),
    *("5.", "_ ", "__/", "a.b", "[**", "[** x **", "[date", "[date ", "<PHI", "<PHI>", "</PHI>"),
    *("**NAME[", "X ", "XXXX-", "A. ", "A, ", "Ab ", "a-", "a's ", "1)", "1. A ", "1. \n", "Dr. "),
    *("rib 2. ", "? ", "10:11 ", "FINDINGS: a. ", "IMPRESSION:\n", "FINDINGS ", "REASON  FOR "),
    *("findings: a\n", "NOTE: b\n", "Findings: ", "HISTORY: x\n", "CHEST: ", "CHEST: 3/4/2006 "),
    *("\nNARRATIVE: CHEST: ", "Abc:\n", "FINAL REPORT ", "WET READ: a\n____________\n", "Report: "),
    *("Please call ", "SUMMARY: a, ", "Dr A\n", "Exam #1: ", "FINDINGS Ab ", "** ", "[date. "),
    *("SUMMARY: 1\n", "end of ", "Jan 3 ", "I, A ", "I have reviewed ", "IMPRESSION: I agree "),
    *("Signed by ", "Reader, MD ", "A Reader, ", "this report ", "3/4/2006 ", "Read by "),
    "images ",
]


def patterns() -> list[re.Pattern]:
    """Every pattern of the modules that read reports, alone or in a tuple."""
    result = []
    for module in (heads, reports, prompts):
        for value in vars(module).values():
            for entry in value if isinstance(value, tuple) else (value,):
                entry = entry[0] if isinstance(entry, tuple) and entry else entry
                if isinstance(entry, re.Pattern):
                    result.append(entry)
    return result


class Matcher:
    """A backtracking matcher of a pattern's parse tree that counts its steps.

    It works like `re`, without the short cuts.
    """

    def __init__(self, pattern: re.Pattern, bound: int = 1000):
        """bound: replaces any larger bound of a repeat; the cost stays linear either way."""
        self.pattern, self.steps, self.bound = pattern, 0, bound
        self.tree = _tree(pattern)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The spans of `pattern.finditer(text)` without empty matches."""
        result, start = [], 0
        while start <= len(text):
            end = next(self.run(self.tree, text, start, self.pattern.flags, {}), None)
            if end is not None and end > start:
                result.append((start, end))
            start = end if end is not None and end > start else start + 1
        return result

    def run(self, items, text, at, flags, groups):
        """Yield the ends of the matches of a sequence of items at a place, in order."""
        if not items:
            yield at
            return
        for end in self.one(items[0], text, at, flags, groups):
            yield from self.run(items[1:], text, end, flags, groups)

    def one(self, item, text, at, flags, groups):
        op, value = item
        self.steps += 1
        c = _const
        if op in (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN):
            if self.fits(item, text, at, flags):
                yield at + 1
        elif op is c.BRANCH:
            for branch in value[1]:
                first = branch[0] if len(branch) else (None, None)
                if first[0] is c.LITERAL and not self.fits(first, text, at, flags):
                    self.steps += 1  # a short cut: most branches end here
                    continue
                yield from self.run(list(branch), text, at, flags, groups)
        elif op is c.SUBPATTERN:
            number, add, drop, inner = value
            for end in self.run(list(inner), text, at, (flags | add) & ~drop, groups):
                groups[number] = (at, end)
                yield end
        elif op in (c.MAX_REPEAT, c.MIN_REPEAT):
            yield from self.repeat(op, value, text, at, flags, groups, 0)
        elif op is c.POSSESSIVE_REPEAT:
            (least, most, inner), count = value, 0
            most = most if most is c.MAXREPEAT else max(least, min(most, self.bound))
            while count < most:
                end = next(self.run(list(inner), text, at, flags, groups), None)
                if end is None or (end == at and count >= least):
                    break
                at, count = end, count + 1
            if count >= least:
                yield at
        elif op in (c.ASSERT, c.ASSERT_NOT):
            direction, inner = value
            place = at if direction > 0 else at - inner.getwidth()[0]
            true = place >= 0 and any(
                True for _ in self.run(list(inner), text, place, flags, groups)
            )
            if true == (op is c.ASSERT):
                yield at
        elif op is c.AT:
            if self.stands(value, text, at, flags):
                yield at
        elif op is c.GROUPREF:
            start, end = groups[value]
            if text.startswith(text[start:end], at):
                yield at + end - start
        else:
            raise NotImplementedError(op)

    def repeat(self, op, value, text, at, flags, groups, count):
        least, most, inner = value
        most = most if most is _const.MAXREPEAT else max(least, min(most, self.bound))
        if op is _const.MIN_REPEAT and count >= least:
            yield at
        if count < most:
            if _simple(inner):  # a run of single characters needs no recursion
                ends = [at]
                while len(ends) <= most - count:
                    end = next(self.one(inner[0], text, ends[-1], flags, groups), None)
                    if end is None:
                        break
                    ends.append(end)
                ends = ends[max(least - count, 0) :]
                if op is _const.MAX_REPEAT:
                    ends.reverse()
                for end in ends if op is _const.MAX_REPEAT else ends[1:]:
                    self.steps += 1
                    yield end
                return
            for end in self.run(list(inner), text, at, flags, groups):
                if end > at or count < least:
                    yield from self.repeat(op, value, text, end, flags, groups, count + 1)
        if op is _const.MAX_REPEAT and count >= least:
            yield at

    def fits(self, item, text, at, flags):
        """Whether one character matches."""
        if at >= len(text):
            return False
        if item[0] is _const.LITERAL and not flags & re.I:
            return item[1] == ord(text[at])
        key = (id(item), text[at], bool(flags & re.I), bool(flags & re.S))
        if key not in _ACCEPTED:
            _ACCEPTED[key] = _accepts(item, text[at], flags)
        return _ACCEPTED[key]

    def stands(self, where, text, at, flags):
        c, word = _const, lambda i: 0 <= i < len(text) and bool(re.match(r"\w", text[i]))
        if where is c.AT_BEGINNING:
            return at == 0 or (bool(flags & re.M) and text[at - 1] == "\n")
        if where is c.AT_BEGINNING_STRING:
            return at == 0
        if where is c.AT_END:
            last = at == len(text) or text[at:] == "\n"
            return last or (bool(flags & re.M) and text[at] == "\n")
        if where is c.AT_END_STRING:
            return at == len(text)
        return (word(at - 1) != word(at)) == (where is c.AT_BOUNDARY)


@functools.cache
def _tree(pattern: re.Pattern) -> list:
    return list(_parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE))


_ACCEPTED: dict[tuple, bool] = {}


def _simple(inner) -> bool:
    c = _const
    return len(inner) == 1 and inner[0][0] in (c.LITERAL, c.NOT_LITERAL, c.ANY, c.IN)


def _accepts(item, character: str, flags: int) -> bool:
    op, value = item
    c, cases = _const, {character}
    if flags & re.I:
        cases |= {character.lower(), character.upper()}
    if op is c.ANY:
        return character != "\n" or bool(flags & re.S)
    if op in (c.LITERAL, c.NOT_LITERAL):
        return (chr(value) in cases) == (op is c.LITERAL)
    negated = value[0][0] is c.NEGATE
    return any(_in_class(entry, cases) for entry in value[negated:]) != negated


def _in_class(entry, cases: set[str]) -> bool:
    op, value = entry
    if op is _const.LITERAL:
        return chr(value) in cases
    if op is _const.RANGE:
        return any(value[0] <= ord(case) <= value[1] for case in cases if len(case) == 1)
    name = str(value).rsplit("_", 1)[1].lower()  # CATEGORY_SPACE, CATEGORY_NOT_WORD, ...
    kind = {"space": "s", "word": "w", "digit": "d"}[name]
    kind = kind.upper() if "NOT" in str(value) else kind
    return bool(re.match(rf"\{kind}", min(cases)))


@pytest.mark.parametrize("pattern", patterns(), ids=lambda p: p.pattern[:30])
def test_steps_grow_no_faster_than_the_text(pattern):
    """The third part of a text costs as much as the second; at quadratic cost, 1.67 times that."""
    for unit in UNITS:
        first, second, third = (_steps(pattern, unit, parts) for parts in (1, 2, 3))
        assert third - second <= 1.25 * (second - first) + 100, unit


def _steps(pattern: re.Pattern, unit: str, parts: int, size: int = 36) -> int:
    matcher = Matcher(pattern, bound=9)
    matcher.spans("\nA " + unit * (parts * max(4, size // len(unit))) + " z")
    return matcher.steps


@pytest.mark.parametrize("pattern", patterns(), ids=lambda p: p.pattern[:30])
def test_the_counting_matcher_agrees_with_re(pattern):
    draw = random.Random(0)
    for _ in range(30):
        text = "\n" + "".join(draw.choice(UNITS) for _ in range(12))
        spans = [match.span() for match in pattern.finditer(text) if match[0]]
        assert Matcher(pattern).spans(text) == spans, text


def test_no_group_within_a_possessive_repeat():
    """Python 3.11 may then end in a SystemError: "The span of capturing group is wrong"."""

    def inner(items, possessive=False):
        for op, value in items:
            held = possessive or op is _const.POSSESSIVE_REPEAT
            assert not (possessive and op is _const.SUBPATTERN and value[0] is not None)
            for part in value if isinstance(value, (tuple, list)) else ():
                for tree in part if isinstance(part, list) else (part,):
                    if isinstance(tree, _parser.SubPattern):
                        inner(tree, held)

    for pattern in patterns():
        inner(_tree(pattern))
    with pytest.raises(AssertionError):
        inner(_tree(re.compile(r"a(?:b|(c)d)*+")))


@pytest.mark.parametrize(
    ("former", "unit"),
    [
        (r"[,;:]+(?: *[,;:])* *([.!?])(?!\d)", ","),
        (r"(?s)\[\*\*.*?\*\*\]", "[**"),
        (r"[a-z]\w*\.\s*$", "a"),
        (r"(?m)^A[ \t]*[-.]?[ \t]*$", " "),
    ],
)
def test_the_count_exposes_former_patterns_of_quadratic_cost(former, unit):
    first, second, third = (_steps(re.compile(former), unit, n, 12) for n in (1, 2, 3))
    assert third - second > 1.5 * (second - first)


@pytest.mark.parametrize("unit", UNITS)
def test_long_runs_of_any_unit_are_read(unit):
    """Long runs of one unit: no text is invented and nothing hangs."""
    text = "INDICATION: a.\n" + unit * (30_000 // len(unit)) + " z"
    parts = reports.sections(text)
    assert all(parts.values())
    assert sum(map(len, parts.values())) <= len(text)
    cleaned = reports.clean(text)
    assert len(cleaned) <= 2 * len(text)
    assert reports.clean(cleaned[-50:]).endswith("z")
    assert reports.sentences(text)[-1].endswith("z")
    reports.select_text("", "", text, ("findings", "impression"))
