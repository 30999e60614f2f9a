"""Head lines of radiology reports: where a section begins, and where a report is closed.

The head lines follow what MIMIC-CXR reports contain (Johnson et al. 2019; the counts of head
lines published with its section parser), CheXpert Plus, Open-i and reports of the VA and the UK.
Every pattern costs time in proportion to the text: what repeats without limit is possessive.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache

# Head lines by section, in lower case. Longer heads win over the words that they contain.
_HEADS = {
    "findings": "findings, finding, observations, imaging notes, imaging findings, "
    "radiographic findings, radiological findings, chest findings, x-ray findings",
    "impression": "impression, impressions, findings and impression, findings and impressions, "
    "findings/impression, findings / impression, findings/ impression, findings & impression, "
    "impression and findings, impression/findings, impression and recommendation, "
    "impression and recommendations, impression/recommendation, impression/recommendations, "
    "conclusion, conclusions, conclusion and recommendation, final impression",
    "indication": "indication, indications, clinical indication, reason for exam, "
    "reason for examination, reason for study, reason for this exam, reason for this examination, "
    "reason for the exam, reason, presentation, indication for study, clinical question, "
    "clinical impression, clinical diagnosis, provisional diagnosis",
    "history": "history, clinical history, patient history, clinical information, clinical notes, "
    "clinical note, clinical details, clinical data, history and indication, medical history",
    "comparison": "comparison, comparisons, comparison exam, comparison exams, comparison film, "
    "comparison films, comparison study, comparison studies, reference exam, prior study, "
    "prior studies, comparison made",
    "technique": "technique, techniques, procedure, procedure comments, protocol, views",
    "examination": "examination, exam, study, type of examination, type of exam, exam type, "
    "procedure name",
    "recommendations": "recommendation, recommendations, recommendation(s)",
    "notification": "notification, notifications, communication, critical results, "
    "critical result, critical findings, critical finding, critical values, critical value",
    "addendum": "addendum, final addendum, addendum report",
    "wet_read": "wet read, wetread, wet reading, preliminary report, preliminary read, pfi, "
    "pfi report, preliminary findings, preliminary impression",
    "other": "discussion, date, date of exam",
}
# Heads whose text stands in for findings or impression where these have no head of their own.
_STAND_INS = {
    "view": "narrative, report, report text, result, results, description",
    "anatomy": "other findings, additional findings, incidental findings, ancillary findings",
    "summary": "summary, diagnosis, diagnoses, opinion, interpretation",
}
_FINAL = {"final": "final report, final read, final reading"}
SECTION_OF = {
    head: name
    for name, heads in (_HEADS | _STAND_INS | _FINAL).items()
    for head in heads.split(", ")
}
SECTION_NAMES = (*_HEADS, "preamble", "last_paragraph")
# Inside a line only the heads that nobody writes as part of a sentence count.
_NEVER_INLINE = {"study", "views", "reason", "finding", "summary", "opinion", "diagnosis", "date"}
_NEVER_INLINE |= {"procedure", "protocol", "final report", "exam", "diagnoses", "result", "results"}
_NEVER_INLINE |= {"description", "critical finding", "critical result"}

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

# A head closes the report if it consists of these words alone and has one of the first line.
_CLOSING = set(
    re.findall(
        r"\w+",
        "acc accession agreement approved approver attending attestation authenticated "
        "authenticator begun cc code codes confidentiality consultant copies copy cpt dictated "
        "dictation dictator disclaimer dob doctor email ended esig fax fellow finalised finalized "
        "gmc hcpcs id imager initials mrn name nhs npi pager phone physician physicians printed "
        "provider radiographer radiologist radiologists reader readers resident residents sig "
        "signatory signature signatures signed signer technician technologist tel telephone "
        "teleradiologist transcribed transcriber transcription transcriptionist typed typist uhid "
        "verified verifier workstation",
    )
)
_BY = set(
    re.findall(
        r"\w+",
        "addended authorised authorized checked completed confirmed created edited entered "
        "generated interpreted modified ordered performed prepared read referred released "
        "reported requested reviewed supervised updated validated written",
    )
)
_LABEL = _BY | set(
    re.findall(
        r"\w+",
        "and approving at authorising authorizing billing birth by chest chief clinical cm date "
        "datetime day department diagnosis diagnostic dictating digital digitally do document dr "
        "dt e electronic electronically encounter es exam examination final first for hospital "
        "icd imaging initial interpretation interpreting job last level license location md "
        "medical no notice number of on or order ordering page patient performing person personal "
        "preliminary primary procedure radiology reading record referring report reporting "
        "requesting responsible result resulting reviewing rt s secondary senior service signing "
        "staff statement station status study supervising teaching the time title to transcribing "
        "verifying version visit was workflow x",
    )
)
_LABEL |= _CLOSING
_LAST = (" by", " on", " at", " location", " site", " department", " status", " number", " #")
_ENDED = re.compile(
    r"end of(?: \w+){1,3}$|end(?: impressions?| findings| report)?$|(?:dd|dt|td|tt)$"
    r"|summary (?:code|level|#?\d)|icd\W?\d"
)
_TOLD = re.compile(
    r"(?:(?:urgent|critical|significant|unexpected|non|emergent|important|actionable|results?"
    r"|findings?|values?|radiology|physician)[ -])*(?:communicat|notif|(?:discussed|called|phoned) "
    r"(?:to|with))|discussion of (?:\w+ )*(?:findings|results)"
)


def _alternatives(heads: list[str]) -> str:
    longest_first = sorted(heads, key=len, reverse=True)
    return "|".join(re.escape(head).replace(r"\ ", "[ \t]++") for head in longest_first)


_ALL = _alternatives(list(SECTION_OF))
_UPPER = _alternatives([head.upper() for head in SECTION_OF])
_UPPER_INLINE = _alternatives([head.upper() for head in SECTION_OF if head not in _NEVER_INLINE])
_NOTE = r"(?:[ \t]*+\([^()\n]{0,40}+\))?+"  # as in IMPRESSION (ADDENDUM):
# Each pattern starts with the one character before the head, by which a search is quick.
_LINE_PATTERNS = (
    # Anything short with a colon at the start of a line; `_section_of` decides. 5:47 is a time.
    re.compile(
        r"\n[ \t*#]*+(?:\d{1,2}[.)][ \t]*+)?+"
        r"(?!FINAL REPORT)(?P<head>[A-Za-z][^:\n]{1,70}+):(?!(?<=\d:)\d)"
    ),
    # A known head alone on its line, or in capitals before a dash, semicolon or full stop.
    re.compile(rf"\n[ \t*#]*+(?=[A-Z])(?P<head>(?i:{_ALL})){_NOTE}[ \t*]*+[-–.;]?+[ \t]*+$", re.M),
    re.compile(rf"\n[ \t]*+(?P<head>{_UPPER}){_NOTE}(?:[;.]|[ \t]++[-–])[ \t]++(?=\S)"),
    # In capitals before a sentence that is not.
    re.compile(
        rf"[\n.?!][ \t]*+(?=[A-Z]{{3}})(?P<head>{_UPPER_INLINE})[ \t]++(?=[A-Z][a-z]|\d[.)])"
    ),
    # Flattened text: capitals anywhere.
    re.compile(rf"[^\w(/&-](?=[A-Z]{{3}})(?P<head>{_UPPER_INLINE}){_NOTE}[ \t]*+(?=:)"),
    re.compile(
        r"[^\w/-](?=[CNcn])(?P<head>(?i:communication|notification) (?i:of) [\w ]{1,40}+"
        r"|CRITICAL (?:FINDINGS?|RESULTS?) COMMUNICATION)(?=:)"
    ),
    # The title of the report proper, behind a wet read or an addendum.
    re.compile(r"[\n_.?!][ \t*]*+(?P<head>FINAL (?:REPORT|ADDENDUM))\b"),
)
# Flattened text in other case: what nobody writes inside a sentence, at the start of one; the
# main heads anywhere, unless the word before belongs to them, as in Clinical Impression.
_SENTENCE_HEAD = re.compile(r"[.?!]  ?(?P<head>[A-Z][^:.\n]{1,70}+):(?!(?<=\d:)\d)")
_MAIN_HEAD = re.compile(
    r"[ \t](?P<head>Findings|Impressions?|Conclusions?|Notification|Recommendations?)[ \t]*+:"
)
_WORD = re.compile(r"[^\W\d_]+")
_NO_LABEL = re.compile(r"[^\w /()#-]")
_TITLE_CASE = re.compile(r"(?!None\b|Na[nN]\b)[A-Z][a-z]")
_RULE = re.compile("_{10,}+")  # ends a wet read or an addendum


def _phrases(*alternatives: str) -> str:
    return "|".join(alternatives).replace(" ", r"(?:\s{1,9}+)")


# Sentences and lines that close a report: who attests and signs it, and how it came about.
_ATTESTED = "(?:re)?viewed|interpreted|examined|supervised|attest|certify|concur|agrees?"
_SIGNED = "signed|dictated|transcribed|typed|authenticated|approved|finali[sz]ed|e-?signed"
_READ = f"{_SIGNED}|{'|'.join(sorted(_BY))}|verified|electronically|digitally"
_REPORT = "report|dictation|document|transcription|transcript|note"
_STUDY = f"{_REPORT}|study|exam|examination|images?|films?|radiographs?|case"
# Who read or checked it: a device or a film confirms, too.
_WHO = (
    "(?::| ?$| (?:(?:the|an?) )?(?:dr|doctor|attending|resident|staff|radiologist|consultant)\\b"
    r"| (?-i:[A-Z]\.|[A-Z][a-z]|[A-Z] [A-Z]|[_X<[]{2}))"
)
_NAME = r"(?-i:[A-Z])(?:\w{0,2}\.|[\w'-]{0,20}+)|_{2,9}+|[\[<]\w{2,12}+[\]>]"
_DEGREE = (
    r"dmrd|dnb|m\.?d|d\.?o|m\.?b\.?b\.?s|m\.?b|ch\.?b|ph\.?d|frcr|franzcr|frcpc?|facr|r\.?t|pa-c"
)
_ATTESTATION = re.compile(
    r"(?i)[^\w-](?=[ait])(?:"
    + _phrases(
        rf"(?-i:I) (?:(?:have|had|also|hereby|do|personally|independently) )*+"
        rf"(?:{_ATTESTED}|was (?:personally )?present)\b",
        r"(?-i:I), [^:;\n]{1,80}?,? (?:have|personally|attest|certify|agree|concur|reviewed)\b",
        r"as (?:the )?(?:attending|teaching|supervising|staff) (?:physician|radiologist),? I\b",
        "the (?:above )?(?:attending|teaching|supervising|staff|signing|undersigned) (?:physician"
        rf" |radiologist )?(?:(?:has|have|personally|also) )*+(?:{_ATTESTED})\b",
    )
    + ")"
)
_ANYWHERE = _phrases(
    f"(?:(?:final |preliminary )?report )?(?:electronically|digitally) (?:{_READ})\\b",
    r"(?-i:(?:[A-Z][a-z]{2,12}ed|Read) By [A-Z])"
    r"|(?-i:R)(?<!ously.R)(?:ead|eported) by dr\b|/e?s/ ?(?-i:[A-Z])",
    rf"(?:(?:final )?report )?(?:{_SIGNED})(?: and \w{{1,20}}+(?: signed)?)?+ by\b",
    f"(?:note: )?this (?:{_REPORT}) "
    "(?:(?:was|were|is|has|have|been|may|also|electronically|digitally) )*+"
    f"(?:{_SIGNED}|{_ATTESTED}|anonymi[sz]ed|de-?identified|generated|created|produced|prepared"
    "|verified|contain|intended|submitted|completed)",
    r"summary:? ?(?:code:? ?)?#?\d{1,2}(?: ?[-–:]|\.?$)",
    r"summary: ?[a-z\x20,/]{1,60}(?:previously reported|need action)",
    r"(?:diagnos[ie]s|icd):? ?(?!t1[0-2]|b12)[a-z]\d[\da-z](?:\.\d{1,4})?(?![\w])",
    r"(?:cpt|icd)[- ](?:code|\d)|cc:? dr\b",
    r"all dates (?:are|have|were)\b",
    "(?:primary|secondary) (?:diagnostic codes?|interpreting) ",
    r"accession (?:number|no\b|num\b|id\b|#)",
    r"thank you (?:for|very)\b",
    "(?-i:E)nd (?:of )?(?:(?:the|diagnostic|radiology|final) )?(?-i:(?=[A-Z]))(?:impressions?"
    r"|findings?|report|dictation|addendum|narrative|transcription|document|text|note)\b",
)
_AT_A_START = _phrases(
    rf"(?:last )?(?:{_READ})(?:,? (?:and )?+\w{{1,20}}+){{0,2}}? (?:by{_WHO}|on:? ?\d)",
    rf"(?:{_SIGNED}) (?:by|electronically|using)\b|(?:exam|study) (?:ended|begun):? ?\d",
    r"(?:read|interpreted|reviewed) by (?-i:[A-Z])",
    f"(?:(?:the|this|these|all|above) )*+(?:{_STUDY})(?: and (?:{_STUDY}))?+ "
    f"(?:(?:was|were|has|have|been|personally) )*+(?:{_READ}|{_ATTESTED})"
    rf"(?:,? (?:and )?\w{{1,20}}+){{0,2}} by{_WHO}",
    r"end of (?:the )?(?:\w{1,20}+ )?(?:report|impressions?|findings|dictation|exam|study"
    r"|addendum|narrative|document|text|note)\b",
    r"(?:accession|mrn|workstation|disclaimer|attestation|signature|cpt)\b",
    r"(?:reg\.?|kmc|mci|nmc|mrd|ipd|uhid) no\b|not (?:valid )?for medico",
    r"(?:status:? )?final(?: result)?[\x20*]*+$|this is an? (?:computer|electronic|digital)",
    r"(?:(?:kind|best|warm) )?regards\b|(?:yours )?sincerely\b|(?:with |many )?thanks\b",
    r"by (?:electronically |digitally )?signing\b|please (?:do not hesitate|feel free)\b",
    r"please (?:call|contact|page)\b[^.\n]{0,60}(?:question|radiolog|\d\d)",
    r"(?:if you have|should you have|for) (?:any )?(?:further |additional )?questions\b",
    "(?:voice|speech) recognition",
    f"(?:portions?|parts?|some) (?:of )?(?:this|the) (?:{_REPORT})",
    r"[dtr][dt]?(?:/[dt])?: ?\d{1,2}[/-]",
    r"(?:consultant )?radiologist,? dr\b",
    "(?:attending|interpreting|reading|reporting) (?:physician|doctor|radiologist) "
    "(?-i:[A-Z][a-z])",
    rf"dr\.?\x20(?:{_NAME})(?:\x20(?:{_NAME})){{0,3}}\.?$(?!\n[\x20\t]*+(?-i:[a-z]))",
    rf"(?:dr\.?\x20)?(?:{_NAME})(?:,?\x20(?:{_NAME})){{0,3}},?\x20\(?"
    rf"(?:(?:{_DEGREE})\b|(?:consultant |staff |attending )?radiologist)"
    rf"\.?(?:,? \(?(?:{_DEGREE}|consultant|radiolog(?:ist|y)|radiodiagnosis|gmc|no"
    r"|\d{1,9})\b\.?)*+\)?\.? ?(?:$|(?=\d))",
)
_ENDINGS = (
    re.compile(rf"(?i)[^\w/-](?=[/cdefinprstv]|a[culp])(?:{_ANYWHERE})"),
    re.compile(
        rf"(?i)[\n.?!][ \t*=#<>(\[/-]{{0,80}}+(?-i:(?=[A-Z]|(?<=/)))(?:{_AT_A_START})", re.M
    ),
)
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


@lru_cache(maxsize=4096)
def _section_of(head: str) -> str | None:
    """The section that a head line opens; None when it is no head line."""
    upper = head == head.upper()
    words = re.sub(r"\s*\([^()]*\)", "", head.lower()).strip(" .,-")
    if words in SECTION_OF:
        return SECTION_OF[words]
    tokens = set(re.findall("[a-z]+", words))
    if _TOLD.match(words):
        return "notification"
    if tokens <= _LABEL:
        if tokens & _CLOSING or words.endswith(_LAST):
            return "closing"
        if tokens & {"date", "time"}:
            return "other"
    if _ENDED.match(words):
        return "closing"
    if " " not in words and len(words) > 5:
        close = get_close_matches(words, _FUZZY, 1, cutoff=0.85)
        if close:
            return close[0]
    if not upper or re.search(r"\w{3}\. ", head):  # LUNGS CLEAR. IMPRESSION: ends a sentence first
        return None
    if re.search(r"wet ?read|prelim", words):
        return "wet_read"
    for name in ("impression", "findings", "indication", "history", "comparison", "addendum"):
        if name in words:
            return name
    if _ANATOMY.search(words) and not re.search(r"\b(?:views?|radiographs?|portable)\b", words):
        return "anatomy"
    return "view" if _VIEW.search(words) else "other_capitals"


def segments(text: str) -> list[tuple[str, str]]:
    """The report cut at its head lines.

    Returns:
      (kind, raw text) in the order of the report. A kind is one of SECTION_NAMES; `view`, a title
      or a head for the report as a whole; `summary`, a head for a diagnosis or a code; `anatomy`;
      `other_capitals`, an unknown head; `closing`, what is no part of the report's text; `final`
      and `rule`, which end a preliminary report.
    """
    text = f"\n{text}"  # so that a line starts behind a line break
    found = sorted(_heads(text))
    result, start, current, position, opened = [], 0, "preamble", 0, False
    for begin, end, name in found:
        inside = current in ("findings", "impression", "view", "anatomy", "summary")
        loose = name in ("view", "anatomy", "other_capitals")
        # LUNGS: or AP CHEST: inside the findings is part of them
        if begin < position or (loose and (inside or (current == "closing" and opened))):
            continue
        if name == "attestation":
            if inside and start <= begin and not re.search(r"\w", text[start:begin]):
                stop = _SENTENCE_END.search(text, -end)  # the text may follow it
                start = stop.end() if stop else len(text)
            if start > begin:
                continue
            name = "closing"
        result.append((current, text[start:begin]))
        opened |= inside
        current, position = name, -end
        start = begin if name == "anatomy" else position  # "HEART: normal" needs its heart
    result.append((current, text[start:]))
    return result


def _heads(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, -end, kind) of all that looks like a head line; they may overlap."""
    for pattern in _LINE_PATTERNS:
        for match in pattern.finditer(text):
            head, start, end = " ".join(match["head"].split()), match.start() + 1, match.end()
            name = _section_of(head)
            if name and not (head.islower() and _mid_sentence(text, start)):
                yield start, -(end + text.startswith(":", end)), name
    for match in _SENTENCE_HEAD.finditer(text):
        head = " ".join(match["head"].split())
        known = head.lower() not in _NEVER_INLINE and head.lower() in SECTION_OF
        name = _section_of(head)
        if name and (known or name in ("closing", "notification")):
            yield match.start() + 1, -match.end(), name
    colon = text.find(":")
    while colon >= 0:
        start, name = _closing_label(text, colon)
        if name == "closing":
            yield start, -colon - 1, name
        colon = text.find(":", colon + 1)
    for match in _MAIN_HEAD.finditer(text):
        before = text[max(0, match.start() - 40) : match.start()].split()
        if before and not _TITLE_CASE.match(before[-1]):
            yield match.start() + 1, -match.end(), SECTION_OF[match["head"].lower()]
    for match in _RULE.finditer(text):
        yield match.start(), -match.end(), "rule"
    for pattern in (*_ENDINGS, _ATTESTATION):
        name = "attestation" if pattern is _ATTESTATION else "closing"
        for match in pattern.finditer(text):
            yield match.start() + (match[0][0] in ".?!)"), -match.end(), name


def _closing_label(text: str, colon: int) -> tuple[int, str | None]:
    """Where a label such as `Reading Radiologist:` starts, also inside a line, and its kind."""
    before = text[max(0, colon - 60) : colon]
    last = _WORD.findall(before[-20:].lower())[-1:]
    if not last or last[0] not in _LABEL or re.match(r"\d:\d", text[colon - 1 : colon + 2]):
        return 0, None
    words = _NO_LABEL.split(before)[-1]
    start = stop = len(words)
    for word in reversed(words.split()):
        if not _LABEL.issuperset(_WORD.findall(word.lower())):
            break
        stop = words.rindex(word, 0, stop)
        behind = max(colon - len(words) + stop - 1, 0)  # what ends before the word and a space
        if word[0].isupper() or text[max(behind - 1, 0) : behind] in (".", "?", "!"):
            start = stop
    label = words[start:]
    return colon - len(label), _section_of(label) if label else None


def untitled(text: str) -> str:
    """The text behind the titles and dates that it starts with."""
    position = 0
    while (title := _TITLE.match(text, position)) and _section_of(title["head"]) == "view":
        position = title.end()
    dates = _DATES.match(text, position)
    return text[dates.end() if dates else position :]


def _mid_sentence(text: str, start: int) -> bool:
    """Whether a line break before `start` only wraps a sentence: 'many\\nfindings: ...'."""
    end = last_character(text, start, " \t\n")
    return end > 0 and text[end - 1] not in ".:!?_" and text.count("\n", end, start) < 2


def last_character(text: str, stop: int, space: str) -> int:
    """Where text[:stop] ends without the `space` at its end."""
    while stop and text[stop - 1] in space:
        stop -= 1
    return stop
