"""Free-text radiology reports: sections, sentences, clean-up, and the text that a model reads.

The head lines follow what MIMIC-CXR reports contain (Johnson et al. 2019; the counts of head
lines published with its section parser), and the same order of preference when there are none:
the last paragraphs, then a comparison that holds the report.
"""

import re
import unicodedata
from difflib import get_close_matches
from functools import lru_cache
from itertools import pairwise

from medsyn_jax.core.errors import UserError

# Head lines by section, in lower case. Longer heads win over the words that they contain.
_HEADS = {
    "findings": "findings, finding, observations, imaging notes, imaging findings, "
    "radiographic findings, radiological findings, chest findings, x-ray findings",
    "impression": "impression, impressions, findings and impression, findings and impressions, "
    "findings/impression, findings / impression, findings/ impression, findings & impression, "
    "impression and findings, impression/findings, impression and recommendation, "
    "impression and recommendations, impression/recommendation, impression/recommendations, "
    "conclusion, conclusions, conclusion and recommendation, summary, opinion, interpretation, "
    "diagnosis, final impression",
    "indication": "indication, indications, clinical indication, reason for exam, "
    "reason for examination, reason for study, reason for this exam, reason for this examination, "
    "reason for the exam, reason, presentation, indication for study, clinical question",
    "history": "history, clinical history, patient history, clinical information, "
    "clinical details, clinical data, history and indication, medical history",
    "comparison": "comparison, comparisons, comparison exam, comparison exams, comparison film, "
    "comparison films, comparison study, comparison studies, reference exam, prior study, "
    "prior studies, comparison made",
    "technique": "technique, techniques, procedure, protocol, views",
    "examination": "examination, exam, study, type of examination, type of exam, exam type, "
    "procedure name",
    "recommendations": "recommendation, recommendations, recommendation(s)",
    "notification": "notification, notifications, communication, critical results",
    "addendum": "addendum, final addendum, addendum report",
    "wet_read": "wet read, wetread, wet reading, preliminary report, preliminary read, pfi, "
    "pfi report, preliminary findings, preliminary impression",
    "other": "dictated by, signed by, electronically signed by, attending, radiologist, "
    "discussion, date, date of exam, accession number",
    "preamble": "final report",
}
_SECTION_OF = {head: name for name, heads in _HEADS.items() for head in heads.split(", ")}
SECTION_NAMES = (*_HEADS, "last_paragraph")
# Inside a line only the heads that nobody writes as part of a sentence count.
_NEVER_INLINE = {"study", "views", "reason", "finding", "summary", "opinion", "diagnosis", "date"}
_NEVER_INLINE |= {"procedure", "protocol", "attending", "radiologist", "final report", "exam"}

_VIEW = re.compile(
    r"\b(?:chest|portable|(?:pa|ap|frontal|lateral)\b.*\b(?:views?|lat(?:eral)?|pa|ap|upright"
    r"|radiographs?)|(?:one|two|three|single|pa|ap|frontal|lateral) views?|ribs|report"
    r"|radiographs?)\b"
)
_ANATOMY = re.compile(
    r"\b(?:lungs?|pleura|pleural|heart|cardiac|cardiomediastinal|cardiovascular|mediastin\w+|bones?"
    r"|osseous|skelet\w+|soft tissues?|lines?|tubes?|devices?|hardware|diaphragms?|hil[au]\w*"
    r"|airways?|trachea|abdomen|pneumothorax|effusions?|parenchyma|vasculature|aorta|spine)\b"
)
_FUZZY = ("impression", "findings", "indication", "comparison", "technique", "examination")


def _alternatives(heads: list[str]) -> str:
    longest_first = sorted(heads, key=len, reverse=True)
    return "|".join(re.escape(head).replace(r"\ ", "[ \t]+") for head in longest_first)


_ALL = _alternatives(list(_SECTION_OF))
_INLINE = _alternatives([head for head in _SECTION_OF if head not in _NEVER_INLINE])
_UPPER = _alternatives([head.upper() for head in _SECTION_OF])
_UPPER_INLINE = _alternatives([head.upper() for head in _SECTION_OF if head not in _NEVER_INLINE])
_NOTE = r"(?:[ \t]*\([^()\n]{0,40}\))?"  # as in IMPRESSION (ADDENDUM):
_HEAD_PATTERNS = (
    # Anything short with a colon at the start of a line; `_section_of` decides. 5:47 is a time.
    re.compile(
        r"^[ \t]*(?:\d{1,2}[.)][ \t]*)?"
        r"(?!FINAL REPORT)(?P<head>[A-Za-z][^:\n]{1,70}?)[ \t]*:(?!(?<=\d:)\d)",
        re.M,
    ),
    # A known head alone on its line, or in capitals before a dash, semicolon or full stop.
    re.compile(rf"^[ \t]*(?=[A-Z])(?P<head>(?i:{_ALL})){_NOTE}[ \t]*[-–.;]?[ \t]*$", re.M),
    re.compile(rf"^[ \t]*(?P<head>{_UPPER}){_NOTE}(?:[;.]|[ \t]+[-–])[ \t]+(?=\S)", re.M),
    # Flattened text: capitals anywhere, other case only after the end of a sentence.
    re.compile(rf"(?<![\w(/&-])(?=[A-Z]{{3}})(?P<head>{_UPPER_INLINE}){_NOTE}[ \t]*:"),
    re.compile(rf"(?:(?<=[.?!] )|(?<=[.?!]  ))(?=[A-Z])(?P<head>(?i:{_INLINE}))[ \t]*:"),
    # The end of a wet read or an addendum: a ruled line, or the title of the report proper.
    re.compile(r"_{10,}"),
    re.compile(r"(?:^[ \t]*|(?<=_ )|(?<=_  ))(?P<head>FINAL (?:REPORT|ADDENDUM))\b:?", re.M),
)


@lru_cache(maxsize=4096)
def _section_of(head: str) -> str | None:
    """The section that a head line opens; None when it is no head line."""
    upper = head == head.upper()
    words = re.sub(r"\s*\([^()]*\)", "", " ".join(head.lower().split())).strip(" .,-")
    if words in _SECTION_OF:
        return _SECTION_OF[words]
    if " " not in words and len(words) > 5:
        close = get_close_matches(words, _FUZZY, 1, cutoff=0.85)
        if close:
            return close[0]
    if not upper:
        return None
    if re.search(r"wet ?read|prelim", words):
        return "wet_read"
    for name in ("impression", "findings", "indication", "history", "comparison", "addendum"):
        if name in words:
            return name
    if _ANATOMY.search(words) and not re.search(r"\b(?:views?|radiographs?|portable)\b", words):
        return "anatomy"
    return "view" if _VIEW.search(words) else "other_capitals"


def _segments(text: str) -> list[tuple[str, str]]:
    """(section, raw text) in the order of the report, with the kinds `view` and `anatomy` kept."""
    found = []
    for pattern in _HEAD_PATTERNS:
        for match in pattern.finditer(text):
            head = match.groupdict().get("head")
            name = _section_of(head) if head else "preamble"
            if name and not (head and head.islower() and _mid_sentence(text, match.start())):
                found.append((match.start(), -match.end(), name))
    segments, start, current, position = [], 0, "preamble", 0
    for begin, end, name in sorted(found):
        inside = current in ("findings", "impression", "view", "anatomy")
        if begin < position or (inside and name in ("view", "anatomy", "other_capitals")):
            continue  # LUNGS: or AP CHEST: inside the findings is part of them
        segments.append((current, text[start:begin]))
        current, position = name, -end
        start = begin if name == "anatomy" else position  # "HEART: normal" needs its heart
    segments.append((current, text[start:]))
    return segments


def _mid_sentence(text: str, start: int) -> bool:
    """Whether a line break before `start` only wraps a sentence: 'many\\nfindings: ...'."""
    before = text[:start].rstrip(" \t\n")
    apart = text.count("\n", len(before), start) > 1
    return bool(before) and before[-1] not in ".:!?_" and not apart


def sections(text: str) -> dict[str, str]:
    """Splits a report at its head lines.

    Args:
      text: a whole report; line breaks may be missing.

    Returns:
      The raw text of each section that is not empty, by the names of SECTION_NAMES. Of several
      findings or impressions the last counts, as a final report follows a preliminary one; other
      repeated sections are joined. A head for both findings and impression opens `impression`.
      Titles such as CHEST, TWO VIEWS: and LUNGS: open `findings` unless there are such already.
      When there are neither findings nor impression, `last_paragraph` holds what follows the first
      paragraph of the last section, or a report under a bare title.
    """
    every = _segments(text)
    segments = [(name, body) for name, body in every if clean(body)]
    result: dict[str, str] = {}
    loose = [body.strip() for name, body in segments if name in ("view", "anatomy")]
    for name, body in segments:
        name = "other" if name == "other_capitals" else name
        if name in ("findings", "impression"):
            result[name] = body.strip()
        elif name not in ("view", "anatomy"):
            result[name] = "\n".join(filter(None, (result.get(name), body.strip())))
    if "findings" not in result and loose:
        result["findings"] = "\n".join(loose)
    if len(every) > 1 and "findings" not in result and "impression" not in result:
        _take_last_paragraph(result, segments)
    return result


def _take_last_paragraph(result: dict[str, str], segments: list[tuple[str, str]]) -> None:
    asides = ("notification", "recommendations", "addendum", "wet_read", "other")
    for name, body in reversed(segments):
        if name in asides:
            continue
        first, *rest = re.split(r"\n[ \t]*\n\s*", body.strip())
        if name == "preamble" and re.search(r"[a-z]\w*\.\s*$", first):
            first, rest = "", [first, *rest]  # a sentence, so no title: part of the report
        if rest:
            result["last_paragraph"] = "\n\n".join(rest)
            kept = result[name].removesuffix(body.strip()) + first
            result[name] = kept.strip()
            if not result[name]:
                del result[name]
        return


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\ufeff\ufffd\ud800-\udfff]")
# ___ stands for removed text: the most memorised token of MIMIC (arXiv 2502.07516), never kept.
_REMOVED = re.compile(r"\[\*\*.*?\*\*\]|_{2,}(?:[/:.-]*_{2,})*(?:-(?=[a-z])|'s\b)?", re.S)
_PARAGRAPH = re.compile(
    r"\n[ \t]*(?:\n[ \t]*)+|\n[ \t]*[-*•·–][ \t]+(?=\S)|\A\s*[-*•·–][ \t]+(?=\S)"
)
_NUMBER = re.compile(r"(?<!\S)\(?(\d{1,2})[.)](?:[ \t]*(?=[A-Z(])|[ \t]+(?=[a-z\d\"']))")
_COUNTED = re.compile(
    r"\b(?:grade|stage|type|level|ribs?|zone|no|number|figs?|series|image)\s*$", re.I
)


def _parts(text: str) -> list[str]:
    """Paragraphs and list entries, each tidy and on one line."""
    text = _CONTROL.sub(" ", unicodedata.normalize("NFKC", text.replace("\r\n", "\n")))
    text = _REMOVED.sub(" ", text)
    cuts, last = [(0, 0)], 0
    for match in _NUMBER.finditer(text):
        before, number = text[: match.start()].rstrip(" \t"), int(match[1])
        fresh = not before or before[-1] in "\n.:;!?"
        capital = text[match.end() : match.end() + 1].isupper()
        starts_line = not before or before[-1] == "\n"
        follows = number == last + 1 and last > 0 and not _COUNTED.search(before)
        if starts_line or (capital and (fresh or follows)):
            cuts.append(match.span())
            last = number
    cuts.append((len(text), len(text)))
    entries = [text[end:begin] for (_, end), (begin, _) in pairwise(cuts)]
    tidy = (_tidy(part) for entry in entries for part in _PARAGRAPH.split(entry))
    return [part for part in tidy if part]


def _tidy(text: str) -> str:
    text = re.sub(r"\(\s*\)|\[\s*\]|\{\s*\}", " ", text)
    text = " ".join(text.split())
    text = re.sub(r" +([.,;:!?])(?!\d)", r"\1", text)
    text = re.sub(r"([.!?])(?: *[.!?](?!\d))+", r"\1", text)
    text = re.sub(r"[,;:]+(?: *[,;:])* *([.!?])(?!\d)", r"\1", text)
    text = re.sub(r"([,;:])(?: *[,;:])+", r"\1", text)
    text = re.sub(r"([-/\\*=#~])(?: *\1)+", r"\1", text)
    text = re.sub(r"^(?:[,;:!?/\\*=#~ ]|[.-](?!\d))+", "", text)
    return text if re.search(r"\w", text) else ""


def clean(text: str) -> str:
    """One line of text: no `___`, no list numbers or bullets, white space and punctuation tidy.

    Case stays, as it is the tokenizer's business. An entry of a list and a paragraph that lack
    their full stop get one, so that `sentences` still finds their ends.
    """
    parts = _parts(text)
    ended = [part if part[-1] in ".!?:;," else part + "." for part in parts[:-1]]
    return " ".join([*ended, *parts[-1:]])


_TITLES = {"dr", "drs", "mr", "mrs", "ms", "prof"}
_ABBREVIATIONS = {*_TITLES, "st", "vs", "approx", "cf", "ca", "e.g", "i.e", "fig", "figs", "al"}
_OPEN_ENDED = {"etc", "a.m", "p.m", "jr", "sr", "inc"}  # these end a sentence before a capital only
_STOP = re.compile(r"[.!?]+[\"')\]]*\s+(?=\S)")


def sentences(text: str) -> list[str]:
    """The sentences of a report or section, cleaned.

    `Dr.`, `2.5 cm` and initials do not end a sentence; entries of numbered lists and paragraphs do.
    """
    result = []
    for part in _parts(text):
        start = 0
        for match in _STOP.finditer(part):
            if _ends(part[start : match.start()], match[0], part[match.end() :]):
                result.append(part[start : match.end()].strip())
                start = match.end()
        result.append(part[start:].strip())
    return [sentence for sentence in result if token_count(sentence)]


def _ends(before: str, stop: str, after: str) -> bool:
    if stop[0] != ".":
        return True
    words = [word.strip("(\"'[.,").lower() for word in before.split()[-2:]]
    last = words[-1] if words else ""
    if last in _ABBREVIATIONS:
        return False
    if len(last) == 1 and len(words) == 2 and words[0] in _TITLES:
        return False
    if last in _OPEN_ENDED:
        return after[0].isupper()
    return not (last.isdigit() and (after[0].isdigit() or after[0].islower()))


def token_count(text: str) -> int:
    """Number of words (runs of letters and digits): the field drops reports with fewer than 3."""
    return len(re.findall(r"\w+", text))


def select_text(findings: str, impression: str, report: str, sections: tuple[str, ...]) -> str:
    """The text that a model reads.

    Args:
      findings: cleaned section, '' when absent.
      impression: cleaned section, '' when absent.
      report: the raw report.
      sections: names of SECTION_NAMES in the order wanted, or "report" for all of it.

    Returns:
      The wanted sections joined by a space. When they are all empty: the impression or the
      findings, whichever is there; else the whole of a report without head lines; else the last
      paragraphs, or another section that holds several sentences (first of all the comparison).
      '' when a report has head lines and nothing of the kind.

    Raises:
      UserError: an unknown section name.
    """
    main = {"findings": findings, "impression": impression, "report": ""}
    unknown = [name for name in sections if name not in (*SECTION_NAMES, "report")]
    if unknown:
        names = ", ".join((*SECTION_NAMES, "report"))
        raise UserError(f"unknown section: sections: {unknown[0]!r} is not one of {names}")
    if "report" in sections:
        return clean(report)
    others = {} if set(sections) <= set(main) else _cleaned_sections(report)
    wanted = [main[name] if name in main else others.get(name, "") for name in sections]
    return " ".join(filter(None, wanted)) or impression or findings or _body(report)


def _cleaned_sections(report: str) -> dict[str, str]:
    return {name: clean(body) for name, body in sections(report).items()}


def _body(report: str) -> str:
    found = _cleaned_sections(report)
    if set(found) <= {"preamble"}:
        return clean(report)
    if "last_paragraph" in found:
        return found["last_paragraph"]
    names = ("comparison", "other", "preamble", "indication", "history")
    texts = [found.get(name, "") for name in names]
    # One sentence there is what the head line promises, more hold the report.
    return next((text for text in texts if len(sentences(text)) > 1), "")
