"""Free-text radiology reports: sections, sentences, clean-up, and the text for a model.

Without findings and impression the order of preference is MIMIC-CXR's (Johnson et al. 2019): the
last paragraphs, then a comparison that holds the report. Each pattern takes time in proportion to
the text: unlimited repeats are possessive.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.text import heads
from medsyn_jax.data.text.heads import SECTION_NAMES, SECTION_OF

# The main sections, and the kinds of segments that replace each in its absence.
_MAIN = {"findings": ("view", "anatomy"), "impression": ("summary",)}
_NO_SECTION = {*_MAIN, "view", "anatomy", "summary", "final", "rule"}
_ASIDES = ("notification", "recommendations", "addendum", "wet_read", "other")
_EMPTY = {"none", "nan", "n/a", "na", "null", "nil", "not available", "not applicable"}
_EMPTY |= {"none available", "none provided", "not provided", "see impression", "see below"}
# 2-ABNORMAL, PREVIOUSLY REPORTED and J90 are codes, not diagnoses.
_CODE = re.compile(
    r"(?:code )?\d{1,2} ?[-–:=] ?[A-Z][A-Z ,/()-]*+\.?|(?:[A-Z]\d[\dA-Z][\d.]{0,5}+[,; ]*+)++|\d+"
)
_GAP = re.compile(r"\n[ \t]*+\n\s*+")


def sections(text: str) -> dict[str, str]:
    """Split a report at its head lines.

    Args:
      text: a whole report; line breaks may be missing.

    Returns:
      The raw text of each section that is not empty, by the names of SECTION_NAMES. Of several
      findings or impressions those of the final report win over a preliminary report's, else the
      one with most words, else the last; other repeated sections are joined. A head for both
      findings and impression opens `impression`. In a report without the proper heads, titles such
      as CHEST, TWO VIEWS: and LUNGS: open `findings`, and SUMMARY: opens `impression`, unless their
      text is only `None.`, a date or a code. Signatures, attestations, accession numbers and the
      like are in no section. Without findings and impression, `last_paragraph` holds the text
      behind the first paragraph of the last section, or a report under a bare title.
    """
    every = heads.segments(text.replace("\r\n", "\n").replace("\r", "\n"))
    segments = list(_informative(every))
    result: dict[str, str] = {}
    for reading in _readings(segments):
        result |= _main_sections(reading)
    others = [(kind, body) for kind, body in segments if kind not in _NO_SECTION]
    has_heads = any(kind != "closing" for kind, _ in every[1:])
    last = _take_last_paragraph(others) if has_heads and not result else ""
    bodies: dict[str, list[str]] = {}
    for kind, body in others:
        if body:
            bodies.setdefault("other" if kind == "other_capitals" else kind, []).append(body)
    result |= {name: "\n".join(parts) for name, parts in bodies.items()}
    return result | ({"last_paragraph": last} if last else {})


def _informative(segments: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The segments with text, and the ends of preliminary reports.

    A closing behind the text of the report is dropped. Of a closing in front of the text, such as
    an accession number at the top, only the line is dropped: prose below it is a report without a
    head.
    """
    has_text = False
    for kind, body in segments:
        if kind == "closing":
            body = "" if has_text else body.strip().partition("\n")[2]
            kind, body = "preamble", body if _is_prose(body) else ""
        elif kind in ("final", "rule"):
            yield kind, ""
            kind = "preamble"
        elif kind == "view":
            body = heads.untitled(body)
        body = body.strip()
        if not _has_words(body) or (kind in _NO_SECTION and _is_empty(kind, body)):
            continue
        has_text |= kind in _NO_SECTION or (kind == "preamble" and _is_prose(body))
        yield kind, body


_PLAIN_WORD = re.compile(r"(?<!\S)[A-Za-wyz][a-wyz]{2,}+(?![^\s.,:;])")
_PROSE_WORD = re.compile(r"(?<![\w.])[a-z]{3,}+")


def _has_words(body: str) -> bool:
    """Whether `clean` leaves any text; a plain word answers this without cleaning."""
    if "[" not in body and "<" not in body and _PLAIN_WORD.search(body):
        return True
    return bool(clean(body))


def _is_empty(kind: str, body: str) -> bool:
    if len(body) > 80:
        return False
    text = clean(body)
    return text.lower().strip(" .") in _EMPTY or (kind == "summary" and bool(_CODE.fullmatch(text)))


def without_head(text: str, name: str) -> str:
    """A section from a column of its own, without its head; '' for `None.` and the like."""
    head, colon, body = text.strip().partition(":")
    body = body.strip() if colon and SECTION_OF.get(head.strip().lower()) == name else text.strip()
    return "" if _is_empty(name, body) else body


def _is_prose(body: str) -> bool:
    return "." in body and len(_PROSE_WORD.findall(body)) > 1


def _readings(segments: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The preliminary reports or addenda, and the final report."""
    reading, preliminary = [], False
    for kind, body in segments:
        if kind == "final" or (kind == "rule" and preliminary):
            yield reading
            reading, preliminary = [], False
        preliminary |= kind in ("wet_read", "addendum")
        reading.append((kind, body))
    yield reading


def _main_sections(reading: Sequence[tuple[str, str]]) -> dict[str, str]:
    result = {}
    for section, stand_ins in _MAIN.items():
        if proper := [body for kind, body in reading if kind == section]:
            result[section] = max(reversed(proper), key=lambda body: token_count(clean(body)))
        elif loose := [body for kind, body in reading if kind in stand_ins]:
            result[section] = "\n".join(loose)
    return result


def _take_last_paragraph(segments: list[tuple[str, str]]) -> str:
    """Take the text behind the first paragraph of the last segment that is no aside."""
    for i in reversed(range(len(segments))):
        kind, body = segments[i]
        if kind in _ASIDES:
            continue
        first, *rest = _GAP.split(body)
        if kind == "preamble" and re.search(r"[a-z]\w*\.$", first.rstrip()[-60:]):
            first, rest = "", [first, *rest]  # a sentence is no title: part of the report
        if rest:
            segments[i] = kind, first
        return "\n\n".join(rest)
    return ""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\ufeff\ufffd\ud800-\udfff]")
# Marks of removed text in public corpora: ___ (MIMIC-CXR, its most memorised token, arXiv
# 2502.07516), [**2101-1-1**] (MIMIC-III), XXXX (Open-i), [DATE], <HCW>, {{NAME}},
# <PHI TYPE="AGE">80</PHI> (i2b2), **NAME[AA BB] (De-ID), and runs of other signs. Never kept.
_TAG_WORD = (
    "(?:account|accession|address|age|alphanumericid|anonymi[sz]ed|birth|city|clinic"
    "|code|contact|country|date|day|de-?identified|deleted|department|device|doctor|dr"
    "|email|fac|facility|fax|first|gpe|hcw|hidden|hospital|id|initials|institution"
    "|last|location|loc|masked|medical|middle|month|mrn|names?|number|num|nurse|norp"
    "|of|organi[sz]ation|org|patients?|personalname|personal|person|phi|phone|physician"
    "|place|profession|provider|radiologist|record|redacted|removed|room|ssn|staff"
    "|state|street|surname|telephone|time|unit|unk|unique|url|user|username|vendor"
    "|ward|weekday|year|zip)"
)
_TAG = rf"(?i:{_TAG_WORD}(?:[ ._:#/-]*+(?:{_TAG_WORD}|[\d+]{{1,8}}+|[a-z]\b))*+)"
_MARK = (  # each starts with its own character: the search passes quickly over other text
    rf"__++|_(?: _)++|X(?<!\wX)XX++(?![a-z])|XXXX++|XX(?=[/-]X)|XX(?<=X[/-]XX)"
    rf"|x(?<!\wx)x(?:x++\b|(?=/xx))|\[\*\*[^*]*+\*\*\]|\[ ?{_TAG} ?\]|\{{{{?{_TAG}\}}}}?"
    rf"|\*\*{_TAG}(?:\[[^][\n]{{0,60}}+\])?+|<(?i:phi)\b[^<>]*+>[^<>]*+</(?i:phi)>"
    rf"|</?[A-Za-z][\w-]{{0,30}}+ ?/?>|<<?+{_TAG}>>?+"
    r"|###++|##(?=/#)|##(?<=#/##)|\*\*\*++|@@++(?:[A-Z]++@@++)?+|██*+|■■*+|REDACTED\b|ZZZZZ++|QQQQQ++"
)
_REMOVED = re.compile(rf"(?:{_MARK})(?:[/:.-]*+(?:{_MARK}))*+(?:-(?=[a-z])|'s\b)?")
_PARAGRAPH = re.compile(
    r"\n[ \t]*+(?:\n[ \t]*+)++|\n[ \t]*+[-*•·–][ \t]++(?=\S)|\A\s*+[-*•·–][ \t]++(?=\S)"
)
_NUMBER = re.compile(r"(?<!\S)\(?(\d{1,2})[.)](?:[ \t]*+(?=[A-Z(])|[ \t]++(?=[a-z\d\"']))")
_COUNTED = re.compile(
    r"\b(?:grade|stage|type|level|ribs?|zone|no|number|figs?|series|image)\s*$", re.I
)


def _parts(text: str) -> list[str]:
    """Paragraphs and list entries, each tidied and on one line."""
    text = _CONTROL.sub(" ", unicodedata.normalize("NFKC", text.replace("\r\n", "\n")))
    text = _REMOVED.sub(" ", text)
    cuts, last = [(0, 0)], 0
    for match in _NUMBER.finditer(text):
        end, number = heads.last_character(text, match.start(), " \t"), int(match[1])
        before = text[max(0, end - 20) : end]
        fresh = not before or before[-1] in "\n.:;!?"
        capital = text[match.end() : match.end() + 1].isupper()
        starts_line = not before or before[-1] == "\n"
        follows = number == last + 1 and last > 0 and not _COUNTED.search(before)
        if starts_line or (capital and (fresh or follows)):
            cuts.append(match.span())
            last = number
    cuts.append((len(text), len(text)))
    entries = [text[end:begin] for (_, end), (begin, _) in pairwise(cuts)]
    parts = (_tidy(part) for entry in entries for part in _PARAGRAPH.split(entry))
    return [part for part in parts if part]


_BRACKETS = re.compile(r"\(\s*+\)|\[\s*+\]|\{\s*+\}")
_TIDY = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" ([.,;:!?])(?!\d)", r"\1"),
        (r"([.!?])(?: ?[.!?](?!\d))++", r"\1"),
        (r"(?<![,;:])(?<![,;:] )[,;:](?: ?[,;:])*+ ?([.!?])(?!\d)", r"\1"),
        (r"([,;:])(?: ?[,;:])++", r"\1"),
        (r"([-/\\*=#~])(?: ?\1)++", r"\1"),
        (r"^(?:[,;:!?/\\*=#~ ]|[.-](?!\d))++", ""),
    )
)
# A text without any of these needs no tidying; this test is quicker than the tidying.
_UNTIDY = (re.compile(r" [.,;:!?]"), re.compile(r"[.,;:!?/\\*=#~-] ?[.,;:!?/\\*=#~-]"))


def _tidy(text: str) -> str:
    text = " ".join(_BRACKETS.sub(" ", text).split())
    if text[:1] in ".,;:!?/\\*=#~-" or any(pattern.search(text) for pattern in _UNTIDY):
        for pattern, replacement in _TIDY:
            text = pattern.sub(replacement, text)
    return text if re.search(r"\w", text) else ""


def clean(text: str) -> str:
    """The text on one line, without marks of de-identification, list numbers and bullets.

    White space and punctuation are tidied; case stays, as lower case is up to the tokenizer. List
    entries and paragraphs without a full stop get one, so that `sentences` still finds their ends.
    """
    parts = _parts(text)
    ended = [part if part[-1] in ".!?:;," else part + "." for part in parts[:-1]]
    return " ".join([*ended, *parts[-1:]])


_TITLES = {"dr", "drs", "mr", "mrs", "ms", "prof"}
_ABBREVIATIONS = {*_TITLES, "st", "vs", "approx", "cf", "ca", "e.g", "i.e", "fig", "figs", "al"}
_OPEN_ENDED = {"etc", "a.m", "p.m", "jr", "sr", "inc"}  # end a sentence before a capital only
_STOP = re.compile(r"(?<![.!?])[.!?]++[\"')\]]*+\s++(?=\S)")


def sentences(text: str) -> list[str]:
    """The cleaned sentences of a report or section.

    `Dr.`, `2.5 cm` and initials do not end a sentence; list entries and paragraphs do.
    """
    result = []
    for part in _parts(text):
        start = 0
        for match in _STOP.finditer(part):
            before = part[max(start, match.start() - 80) : match.start()]  # two words are enough
            if _ends(before, match[0], part[match.end() : match.end() + 1]):
                result.append(part[start : match.end()].strip())
                start = match.end()
        result.append(part[start:].strip())
    return [sentence for sentence in result if token_count(sentence)]


def _ends(before: str, stop: str, after: str) -> bool:
    """Whether the full stop between two texts ends a sentence."""
    if stop[0] != ".":
        return True
    words = [word.strip("(\"'[.,").lower() for word in before.split()[-2:]]
    last = words[-1] if words else ""
    if last in _ABBREVIATIONS:
        return False
    if len(last) == 1 and len(words) == 2 and words[0] in _TITLES:
        return False
    if last in _OPEN_ENDED:
        return after.isupper()
    return not (last.isdigit() and (after.isdigit() or after.islower()))


def has_marks(text: str) -> bool:
    """Whether a raw text holds marks of de-identification, which `clean` removes."""
    return _REMOVED.search(text) is not None


def token_count(text: str) -> int:
    """Number of words (runs of letters and digits); the field drops reports with fewer than 3."""
    return len(re.findall(r"\w+", text))


def select_text(findings: str, impression: str, report: str, sections: tuple[str, ...]) -> str:
    """The text for a model.

    Args:
      findings: cleaned section, '' when absent.
      impression: cleaned section, '' when absent.
      report: the raw report.
      sections: names of SECTION_NAMES in the wanted order, or "report" for the whole report.

    Returns:
      The wanted sections joined by a space. When all of them are empty: the impression, else the
      findings; else the whole of a report without head lines; else the last paragraphs, or another
      section with several sentences (the comparison first). '' for a report with head lines and
      no such text.

    Raises:
      UserError: unknown section name.
    """
    main = {"findings": findings, "impression": impression, "report": ""}
    for name in sections:
        if name not in (*SECTION_NAMES, "report"):
            names = ", ".join((*SECTION_NAMES, "report"))
            raise UserError(f"unknown section: sections: {name!r} is not one of {names}")
    if "report" in sections:
        return clean(report)
    others = {} if set(sections) <= set(main) else _cleaned_sections(report)
    wanted = [main[name] if name in main else others.get(name, "") for name in sections]
    return " ".join(filter(None, wanted)) or impression or findings or _body(report)


def _cleaned_sections(report: str) -> dict[str, str]:
    return {name: clean(body) for name, body in sections(report).items()}


def _body(report: str) -> str:
    """The text of a report without findings and impression."""
    texts = _cleaned_sections(report)
    if set(texts) <= {"preamble"}:
        return texts.get("preamble", "")
    if "last_paragraph" in texts:
        return texts["last_paragraph"]
    names = ("comparison", "other", "preamble", "indication", "history")
    # One sentence is the text that the head line promises; more sentences hold the report.
    return next((texts[n] for n in names if n in texts and len(sentences(texts[n])) > 1), "")
