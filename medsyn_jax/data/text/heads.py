"""Head lines of radiology reports, and the lines and sentences that close a report.

The wording is data (`heads.toml`); this module compiles it to patterns and cuts a report at their
matches. Each pattern takes time in proportion to the text: unlimited repeats are possessive.
"""

import re
import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_name("heads.toml").read_text(encoding="utf-8"))
# The kind of each known head line in lower case: a section, or view, anatomy, summary or final.
SECTION_OF: dict[str, str] = {
    head: kind
    for kind, heads in (_DATA["sections"] | _DATA["other_kinds"]).items()
    for head in heads
}
SECTION_NAMES = (*_DATA["sections"], "preamble", "last_paragraph")
_NEVER_INLINE = set(_DATA["words"]["never_inline"])
_CLOSING_WORDS = set(_DATA["words"]["closing"].split())
_PARTICIPLES = sorted(_DATA["words"]["participles"].split())
_LABEL_WORDS = {*_CLOSING_WORDS, *_PARTICIPLES, *_DATA["words"]["label"].split()}
_LAST_WORDS = tuple(f" {word}" for word in _DATA["words"]["last"].split())


def _unwrapped(expression: str) -> str:
    """The expression without line breaks and the indentation behind them."""
    return re.sub(r"\n\s*", "", expression)


_TITLES = {kind: _unwrapped("|".join(titles)) for kind, titles in _DATA["titles"].items()}
_VIEW = re.compile(rf"\b(?:{_TITLES['view']})\b")
_VIEW_WORD = re.compile(r"\b(?:views?|radiographs?|portable)\b")
_ANATOMY = re.compile(rf"\b(?:{_TITLES['anatomy']})\b")
_NOTIFICATION = re.compile(_TITLES["notification"])
_CLOSING = re.compile(_TITLES["closing"])
_WET_READ = re.compile(r"wet ?read|prelim")
# Sections known by a misspelt head, and sections known by a longer head in capitals.
_MISSPELT = ("impression", "findings", "indication", "comparison", "technique", "examination")
_INCLUDED = ("impression", "findings", "indication", "history", "comparison", "addendum")


def _known_heads(heads: list[str]) -> str:
    """An expression for any of the heads; longer heads win over the words in them."""
    longest_first = sorted(heads, key=len, reverse=True)
    return "|".join(re.escape(head).replace(r"\ ", "[ \t]++") for head in longest_first)


_ALL = _known_heads(list(SECTION_OF))
_UPPER = _known_heads([head.upper() for head in SECTION_OF])
_UPPER_INLINE = _known_heads([head.upper() for head in SECTION_OF if head not in _NEVER_INLINE])
_NOTE = r"(?:[ \t]*+\([^()\n]{0,40}+\))?+"  # as in IMPRESSION (ADDENDUM):
# Each pattern starts with the one character before the head, for a quick search.
_LINE_PATTERNS = (
    # Anything short with a colon at the start of a line; `_kind` decides. 5:47 is a time.
    re.compile(
        r"\n[ \t*#]*+(?:\d{1,2}[.)][ \t]*+)?+"
        r"(?!FINAL REPORT)(?P<head>[A-Za-z][^:\n]{1,70}+):(?!(?<=\d:)\d)"
    ),
    # A known head alone on its line, or in capitals before a dash, semicolon or full stop.
    re.compile(rf"\n[ \t*#]*+(?=[A-Z])(?P<head>(?i:{_ALL})){_NOTE}[ \t*]*+[-–.;]?+[ \t]*+$", re.M),
    re.compile(rf"\n[ \t]*+(?P<head>{_UPPER}){_NOTE}(?:[;.]|[ \t]++[-–])[ \t]++(?=\S)"),
    # A head in capitals before a sentence in other letters.
    re.compile(
        rf"[\n.?!][ \t]*+(?=[A-Z]{{3}})(?P<head>{_UPPER_INLINE})[ \t]++(?=[A-Z][a-z]|\d[.)])"
    ),
    # Flattened text: a head in capitals anywhere.
    re.compile(rf"[^\w(/&-](?=[A-Z]{{3}})(?P<head>{_UPPER_INLINE}){_NOTE}[ \t]*+(?=:)"),
    re.compile(
        r"[^\w/-](?=[CNcn])(?P<head>(?i:communication|notification) (?i:of) [\w ]{1,40}+"
        r"|CRITICAL (?:FINDINGS?|RESULTS?) COMMUNICATION)(?=:)"
    ),
    # The title of the final report, behind a wet read or an addendum.
    re.compile(r"[\n_.?!][ \t*]*+(?P<head>FINAL (?:REPORT|ADDENDUM))\b"),
)
# Flattened text in other letters: a head that is no common word, at the start of a sentence; the
# main heads anywhere, unless the word before the head belongs to it, as in Clinical Impression.
_SENTENCE_HEAD = re.compile(r"[.?!]  ?(?P<head>[A-Z][^:.\n]{1,70}+):(?!(?<=\d:)\d)")
_MAIN_HEAD = re.compile(
    r"[ \t](?P<head>Findings|Impressions?|Conclusions?|Notification|Recommendations?)[ \t]*+:"
)
_COLON = re.compile(":")
_WORD = re.compile(r"[^\W\d_]+")
_NO_LABEL = re.compile(r"[^\w /()#-]")
_TITLE_CASE = re.compile(r"(?!None\b|Na[nN]\b)[A-Z][a-z]")
_RULE = re.compile("_{10,}+")  # ends a wet read or an addendum

_PARTS = {"participles": "|".join(_PARTICIPLES)} | _DATA["parts"]


def _with_parts(expression: str) -> str:
    """The expression with each {name} replaced by that part."""
    return re.sub(r"\{([a-z]+)\}", lambda name: f"(?:{_with_parts(_PARTS[name[1]])})", expression)


def _phrases(table: str) -> re.Pattern[str]:
    """One pattern for the phrases of a table; a space in them is white space of any kind."""
    phrases = _unwrapped(_with_parts("|".join(_DATA[table]["phrases"])))
    return re.compile(_DATA[table]["start"] + f"(?:{phrases})".replace(" ", r"(?:\s{1,9}+)"))


_ATTESTATION = _phrases("attestation")
_CLOSINGS = (_phrases("closing_anywhere"), _phrases("closing_at_start"))

_MONTH = "(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*+"
_DATE = (
    r"\d{1,4}[/.-]\d{1,2}[/.-]\d{1,4}|\d{1,2}/\d{4}|\d{1,2}:\d\d(?::\d\d)?+(?:[ ]?[ap]\.?m\b\.?)?"
    rf"|{_MONTH}\.?[ ]\d{{1,2}}(?:,?[ ]?\d{{4}})?|\d{{1,2}}[ -]{_MONTH}[ -]\d{{2,4}}"
    r"|\d{4}[ ]?h(?:ou)?rs?|(?<!_)_{2,}+(?=[ \t]*+(?:\n|\Z))"
)
_DATES = re.compile(
    r"(?i)(?:\s|[,;-]|(?:(?:at|on|date|time|dated|performed|obtained):?[ \t]++)?+"
    rf"(?:{_DATE})(?!\w))*+\.?+"
)
_TITLE = re.compile(r"(?<!\s)\s*+(?P<head>[A-Z][^:\n]{1,70}+):")
_SENTENCE_END = re.compile(r"(?<=\w{4})[.:](?=\s)|\n[ \t]*+\n")


def segments(text: str) -> list[tuple[str, str]]:
    """Cut a report at its head lines.

    Returns:
      (kind, raw text) in the order of the report. A kind is one of SECTION_NAMES; `view`, a title
      or a head for the report as a whole; `summary`, a head for a diagnosis or a code; `anatomy`,
      a head for an organ; `other_capitals`, an unknown head; `closing`, where the text of the
      report ends; `final` and `rule`, which end a preliminary report.
    """
    text = f"\n{text}"  # so that each line starts behind a line break
    result, kind, start, position, main_opened = [], "preamble", 0, 0, False
    # Of the heads that start at one place the longest wins.
    for begin, end, head in sorted(_heads(text), key=lambda head: (head[0], -head[1], head[2])):
        in_main = kind in ("findings", "impression", "view", "anatomy", "summary")
        # LUNGS: or AP CHEST: in the findings belongs to the findings.
        loose = head in ("view", "anatomy", "other_capitals")
        if begin < position or (loose and (in_main or (kind == "closing" and main_opened))):
            continue
        if head == "attestation":
            if in_main and start <= begin and not re.search(r"\w", text[start:begin]):
                stop = _SENTENCE_END.search(text, end)  # the text may follow the attestation
                start = stop.end() if stop else len(text)
            if start > begin:
                continue
            head = "closing"
        result.append((kind, text[start:begin]))
        main_opened |= in_main
        kind, position = head, end
        start = begin if kind == "anatomy" else position  # "HEART: normal" needs its heart
    result.append((kind, text[start:]))
    return result


def _heads(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, kind) of each head line and other mark at which a section ends; may overlap."""
    for pattern in _LINE_PATTERNS:
        for match in pattern.finditer(text):
            line, start, end = " ".join(match["head"].split()), match.start() + 1, match.end()
            kind = _kind(line)
            if kind and not (line.islower() and _in_sentence(text, start)):
                yield start, end + text.startswith(":", end), kind
    for match in _SENTENCE_HEAD.finditer(text):
        line = " ".join(match["head"].split())
        known = line.lower() in SECTION_OF and line.lower() not in _NEVER_INLINE
        kind = _kind(line)
        if kind and (known or kind in ("closing", "notification")):
            yield match.start() + 1, match.end(), kind
    for match in _COLON.finditer(text):
        colon = match.start()
        label = _label_before(text, colon)
        if label and _kind(label) == "closing":
            yield colon - len(label), colon + 1, "closing"
    for match in _MAIN_HEAD.finditer(text):
        words = text[max(0, match.start() - 40) : match.start()].split()
        if words and not _TITLE_CASE.match(words[-1]):
            yield match.start() + 1, match.end(), SECTION_OF[match["head"].lower()]
    for match in _RULE.finditer(text):
        yield match.start(), match.end(), "rule"
    for pattern in (*_CLOSINGS, _ATTESTATION):
        kind = "attestation" if pattern is _ATTESTATION else "closing"
        for match in pattern.finditer(text):
            yield match.start() + (match[0][0] in ".?!)"), match.end(), kind


@lru_cache(maxsize=4096)
def _kind(head: str) -> str | None:
    """The kind of segment that a head line opens; None for other text."""
    words = re.sub(r"\s*\([^()]*\)", "", head.lower()).strip(" .,-")
    if words in SECTION_OF:
        return SECTION_OF[words]
    if _NOTIFICATION.match(words):
        return "notification"
    tokens = set(re.findall("[a-z]+", words))
    if tokens <= _LABEL_WORDS:
        if tokens & _CLOSING_WORDS or words.endswith(_LAST_WORDS):
            return "closing"
        if tokens & {"date", "time"}:
            return "other"
    if _CLOSING.match(words):
        return "closing"
    one_word = len(words) > 5 and " " not in words
    if one_word and (close := get_close_matches(words, _MISSPELT, 1, cutoff=0.85)):
        return close[0]
    # In LUNGS CLEAR. IMPRESSION: a sentence ends first.
    if head != head.upper() or re.search(r"\w{3}\. ", head):
        return None
    if _WET_READ.search(words):
        return "wet_read"
    for section in _INCLUDED:
        if section in words:
            return section
    if _ANATOMY.search(words) and not _VIEW_WORD.search(words):
        return "anatomy"
    return "view" if _VIEW.search(words) else "other_capitals"


def _label_before(text: str, colon: int) -> str:
    """The label before a colon, also inside a line, such as `Reading Radiologist`; '' for none."""
    before = text[max(0, colon - 60) : colon]
    last = _WORD.findall(before[-20:].lower())[-1:]
    if not last or last[0] not in _LABEL_WORDS or re.match(r"\d:\d", text[colon - 1 : colon + 2]):
        return ""
    words = _NO_LABEL.split(before)[-1]
    start = stop = len(words)
    for word in reversed(words.split()):
        if not _LABEL_WORDS.issuperset(_WORD.findall(word.lower())):
            break
        stop = words.rindex(word, 0, stop)
        before_space = max(colon - len(words) + stop - 2, 0)
        if word[0].isupper() or text[before_space] in ".?!":
            start = stop
    return words[start:]


def untitled(text: str) -> str:
    """The text behind the titles and dates at its start."""
    position = 0
    while (title := _TITLE.match(text, position)) and _kind(title["head"]) == "view":
        position = title.end()
    dates = _DATES.match(text, position)
    return text[dates.end() if dates else position :]


def _in_sentence(text: str, start: int) -> bool:
    """Whether the line break before `start` only wraps a sentence: 'many\\nfindings: ...'."""
    end = last_character(text, start, " \t\n")
    return end > 0 and text[end - 1] not in ".:!?_" and text.count("\n", end, start) < 2


def last_character(text: str, stop: int, space: str) -> int:
    """The end of text[:stop] without the characters of `space` at its end."""
    while stop and text[stop - 1] in space:
        stop -= 1
    return stop
