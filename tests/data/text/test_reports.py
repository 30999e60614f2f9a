"""Sections, sentences and clean-up of reports in the wording of MIMIC-CXR and others."""

import csv
import random

import pytest

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.text import heads, reports

CLASSIC = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 TECHNIQUE:  Chest PA and lateral

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation, pleural effusion or pneumothorax.  The
 cardiomediastinal silhouette is normal. Clips project over the left lung,
 potentially within the breast.

 IMPRESSION:

 No acute cardiopulmonary process.
"""

WET_READ = """\
                                 WET READ: ___ ___ ___ 10:26 AM
  Mild edema. Impression: discussed by phone.
 ______________________________________________________________________________
                                 FINAL REPORT
 AP CHEST, 5:47 A.M., ___

 HISTORY:  Chest pain.

 IMPRESSION:  AP chest compared to ___:

 Moderate pulmonary edema has worsened.  Dr. ___ was paged at 3:15 p.m.
"""

NO_HEADS = """\
                                 FINAL REPORT
 REASON FOR EXAMINATION:  Evaluation of the patient after surgery.

 Portable AP radiograph of the chest was compared to ___.

 The ET tube tip is 4.5 cm above the carina.  No pneumothorax.
"""

ADDENDUM = """\
                                 FINAL ADDENDUM
 ADDENDUM:  The nodule was discussed with Dr. ___ by telephone.
 ______________________________________________________________________________
                                 FINAL REPORT
 INDICATION:  Cough.

 FINDINGS:  A 6 mm nodule lies in the right upper lobe.

 IMPRESSION:

 1.  Right upper lobe nodule.
 2.  No pneumonia.

 RECOMMENDATION(S):  Chest CT in 3 months.

 NOTIFICATION:  Telephoned to Dr. ___ at 2:30 pm.
"""


CLASSIC, WET_READ, NO_HEADS, ADDENDUM = (
    text.replace("\n\n", "\n \n")  # a blank line of MIMIC-CXR holds one space
    for text in (CLASSIC, WET_READ, NO_HEADS, ADDENDUM)
)


def cut(text: str) -> dict[str, str]:
    """The cleaned sections of a report."""
    return {name: reports.clean(body) for name, body in reports.sections(text).items()}


def test_classic_report():
    assert cut(CLASSIC) == {
        "examination": "CHEST (PA AND LAT)",
        "indication": "F with new onset ascites / eval for infection",
        "technique": "Chest PA and lateral",
        "comparison": "None.",
        "findings": "There is no focal consolidation, pleural effusion or pneumothorax. The "
        "cardiomediastinal silhouette is normal. Clips project over the left lung, potentially "
        "within the breast.",
        "impression": "No acute cardiopulmonary process.",
    }


def test_wet_read_ends_where_the_final_report_begins():
    got = cut(WET_READ)
    assert got["impression"] == (
        "AP chest compared to: Moderate pulmonary edema has worsened. Dr. was paged at 3:15 p.m."
    )
    assert got["history"] == "Chest pain."
    assert "Mild edema" not in got["impression"]
    assert "findings" not in got


def test_addendum_recommendation_and_notification_are_no_impression():
    got = cut(ADDENDUM)
    assert got["impression"] == "Right upper lobe nodule. No pneumonia."
    assert got["findings"] == "A 6 mm nodule lies in the right upper lobe."
    assert got["addendum"] == "The nodule was discussed with Dr. by telephone."
    assert got["recommendations"] == "Chest CT in 3 months."
    assert got["notification"] == "Telephoned to Dr. at 2:30 pm."


def test_last_paragraphs_without_findings_and_impression():
    got = cut(NO_HEADS)
    assert got["indication"] == "Evaluation of the patient after surgery."
    assert got["last_paragraph"] == (
        "Portable AP radiograph of the chest was compared to. "
        "The ET tube tip is 4.5 cm above the carina. No pneumothorax."
    )


def test_title_only_report():
    title = " FINAL REPORT\n CHEST RADIOGRAPH PERFORMED ON ___\n \n The lungs are clear.\n"
    assert cut(title)["last_paragraph"] == "The lungs are clear."
    plain = " FINAL REPORT\n The lungs are clear.\n \n No effusion is seen.\n"
    assert cut(plain)["last_paragraph"] == "The lungs are clear. No effusion is seen."


@pytest.mark.parametrize(
    ("head", "section"),
    [
        ("FINDINGS:", "findings"),
        ("FINDINGS :", "findings"),
        ("FINDING:", "findings"),
        ("FINDINGS (PRELIMINARY):", "findings"),
        ("REFERENCE FINDINGS:", "findings"),
        ("FINDGINGS:", "findings"),
        ("Findings:", "findings"),
        ("findings:", "findings"),
        ("FINDINGS", "findings"),
        ("Findings", "findings"),
        ("FINDINGS -", "findings"),
        ("FINDINGS;", "findings"),
        ("CHEST, TWO VIEWS:", "findings"),
        ("PA AND LATERAL VIEWS OF THE CHEST:", "findings"),
        ("FRONTAL AND LATERAL CHEST RADIOGRAPHS:", "findings"),
        ("PORTABLE AP CHEST RADIOGRAPH:", "findings"),
        ("SINGLE FRONTAL VIEW OF THE CHEST:", "findings"),
        ("REPORT:", "findings"),
        ("Imaging Notes:", "findings"),
        ("IMPRESSION:", "impression"),
        ("IMPRESSION:1.", "impression"),
        ("IMPRESSIONS:", "impression"),
        ("IMPRSSION:", "impression"),
        ("MPRESSION:", "impression"),
        ("impression:", "impression"),
        ("Impression", "impression"),
        ("IMPRESSION (ADDENDUM):", "impression"),
        ("FINAL IMPRESSION:", "impression"),
        ("FINDINGS AND IMPRESSION:", "impression"),
        ("Findings and impression:", "impression"),
        ("FINDINGS/IMPRESSION:", "impression"),
        ("FINDINGS/ IMPRESSION:", "impression"),
        ("IMPRESSION AND RECOMMENDATION:", "impression"),
        ("IMPRESSION AND RECOMMENDATION(S):", "impression"),
        ("ADDENDUM TO IMPRESSION:", "impression"),
        ("CONCLUSION:", "impression"),
        ("CONCLUSIONS:", "impression"),
        ("INDICATION:", "indication"),
        ("IDICATION:", "indication"),
        ("CLINICAL INDICATION:", "indication"),
        ("REASON FOR EXAM:", "indication"),
        ("Reason for examination:", "indication"),
        ("REASON FOR THE EXAM:", "indication"),
        ("HISTORY:", "history"),
        ("CLINICAL HISTORY:", "history"),
        ("PATIENT HISTORY:", "history"),
        ("CLINICAL INFORMATION:", "history"),
        ("COMPARISON:", "comparison"),
        ("COMPARISONS:", "comparison"),
        ("COMPARISON FILM:", "comparison"),
        ("COMPARSION:", "comparison"),
        ("REFERENCE EXAM:", "comparison"),
        ("TECHNIQUE:", "technique"),
        ("EXAMINATION:", "examination"),
        ("EXAM:", "examination"),
        ("TYPE OF EXAMINATION:", "examination"),
        ("RECOMMENDATION:", "recommendations"),
        ("RECOMMENDATION(S):", "recommendations"),
        ("NOTIFICATION:", "notification"),
        ("ADDENDUM:", "addendum"),
        ("WET READ:", "wet_read"),
        ("PFI:", "wet_read"),
    ],
)
def test_head_lines(head, section):
    text = f" FINAL REPORT\n TYPE OF EXAMINATION: Chest.\n\n {head}\n Some words here.\n"
    assert "Some words here." in cut(text)[section]
    if not head.endswith("1.") and ":" in head:  # the head and its text on one line
        text = f" FINAL REPORT\n TYPE OF EXAMINATION: Chest.\n {head}  Some words here.\n"
        assert "Some words here." in cut(text)[section]


def test_a_known_head_is_in_lower_case_and_of_one_kind():
    tables = heads._DATA["sections"] | heads._DATA["other_kinds"]
    known = [head for table in tables.values() for head in table]
    assert len(set(known)) == len(known) == len(heads.SECTION_OF)
    assert all(head == head.lower() for head in known)
    assert heads._NEVER_INLINE.issubset(heads.SECTION_OF)


UNKNOWN = "NOTE, COMMENT, HOSPITAL COURSE, MEDICATIONS, ALLERGIES, FOLLOW UP, QUALITY, LIMITATIONS"


@pytest.mark.parametrize("head", UNKNOWN.split(", "))
def test_an_unknown_head_without_findings_and_impression(head):
    text = f"INDICATION: Fever.\n\n{head}: Supine film.\n\nThe lungs are clear."
    assert cut(text) == {
        "indication": "Fever.",
        "other": "Supine film.",
        "last_paragraph": "The lungs are clear.",
    }
    assert read(text) == "The lungs are clear."
    assert read(f"{head}: Supine film. The lungs are clear.").endswith("The lungs are clear.")
    assert read(" ".join(text.split())).endswith("The lungs are clear.")
    dated = f"CHEST, TWO VIEWS: 3/4/2006\n\n{head}: Supine film.\n\nThe lungs are clear."
    assert read(dated).endswith("The lungs are clear.")


def read(text: str, wanted: tuple[str, ...] = ("findings", "impression")) -> str:
    got = cut(text)
    return reports.select_text(got.get("findings", ""), got.get("impression", ""), text, wanted)


CLOSINGS = """\
END OF IMPRESSION:
*** END OF REPORT ***
End of report.
SUMMARY: 2-ABNORMAL, PREVIOUSLY REPORTED
SUMMARY 2: ABNORMAL, PREVIOUSLY REPORTED
SUMMARY: 4-POSSIBLE SIGNIFICANT FINDINGS, MAY NEED ACTION
DIAGNOSIS: J90
Diagnosis code: R91.8
ICD-10 CODE: J90
CPT CODE: 71045
Primary Diagnostic Code: NORMAL
Secondary Diagnostic Codes: ABNORMALITY, ATTN. NEEDED
Primary Interpreting Staff: A READER, MD, Radiologist
Staff Radiologist: A. Reader
READ BY: A READER, M.D.
INTERPRETED BY: A READER
Dictated and electronically signed by A Reader
Transcribed by: CR
SIGNED BY A READER
Electronically signed by: A Reader MD 3/4/2006 10:11 AM
(Electronically signed by A Reader)
Final report electronically signed by A Reader
/es/ A READER, MD
Electronic Signature: A Reader
Verifier E-Sig:/ES/A READER
Reviewed and approved by A Reader
Reported by Dr A Reader
Final interpretation by: A Reader
Dr A Reader MBBS FRCR, Consultant Radiologist, GMC 1234567
A. Reader, MD
XXXX XXXX, M.D.
ATTENDING PHYSICIAN: A READER
Resident: B Reader
Radiographer: C Reader
Ordering Provider: D Reader
Workstation ID: XR12
ACCESSION NUMBER: 1234567
Accession #: 123
MRN: 123
CC: Dr. D Reader
COMMUNICATION OF CRITICAL FINDINGS: Dr. D was called.
Communication of critical results: Dr. D was called.
NOTIFICATION OF FINDINGS: Dr. D was called.
I have personally reviewed the images and agree with the report transcribed above.
I, A Reader, have reviewed the images and concur with these findings interpreted by B Reader.
I, A. Reader, M.D., have personally reviewed the images and agree.
I agree with the resident's interpretation.
As the attending radiologist, I have reviewed the images.
The attending radiologist has reviewed the images and agrees.
Attestation: seen.
Images reviewed and interpreted by A Reader.
This study was interpreted by A Reader.
This report has been anonymized. All dates are offset from the actual dates.
Portions of this report were dictated using voice recognition software.
Thank you for referring this patient.
If you have any questions, call 123.
DISCLAIMER: Words may be wrong.
D: 3/4/2006 T: 3/5/2006
Date dictated: 3/4/2006
Report status: Final
Status: Final
Reading Location: HOME-12
Exam ended: 3/4/2006 10:11 AM
Dictated on 3/4/2006 10:11 AM
Signed electronically by A Reader
Report authorised by Dr A Reader
Radiology technician: C Reader
Order #: 123
Date of birth and MRN: 123
DOB: 3/4/1950
Tel: 555 1234
ICD-10: J90
CPT Codes 71045, 71046
Acc No: 123
Critical value notification: Dr. D was called.
Results called to: Dr. D
Dr. A Reader
Dr. A Reader (MD Radiodiagnosis)
Consultant Radiologist Dr A Reader
KMC No. 12345
Kind regards, A Reader
By signing this report, I attest to the above.
This is a computer generated report.
Not valid for medico-legal purposes.
CONFIDENTIALITY NOTICE: Do not share."""


@pytest.mark.parametrize("closing", CLOSINGS.splitlines())
def test_a_closing_adds_no_text(closing):
    lines = f"FINDINGS: Big heart.\n\nIMPRESSION: Effusion.\n\n{closing}\n"
    others = (
        f"**Findings:** Big heart.\n\n## Impression\n\nEffusion.\n\n{closing}\n",
        lines.replace("\n", "\r\n"),
        " ".join(lines.split()),
        f"FINDINGS:\nBig heart.\n\nIMPRESSION:\nEffusion.\n{closing}\nA Reader\n",
        lines.replace(closing, closing.upper()),
        f"{lines}\nACCESSION NUMBER:\n1234567\nThis report has been anonymized.",
    )
    for text in (lines, *others):
        assert read(text) == "Big heart. Effusion."
        kept = {name: body for name, body in cut(text).items() if name != "notification"}
        assert kept.keys() == {"findings", "impression"}
    bare = f"The heart is big. There is an effusion.\n\n{closing}\n"
    assert read(bare) == "The heart is big. There is an effusion."


@pytest.mark.parametrize(
    "closing",
    [
        "Reading Location: HOME-12",
        "Exam Ended: 3/4/2006",
        "Reported By Dr A Reader",
        "ICD-10: J90",
        "Reader 1: A",
        "Signed Date/Time: 3/4/2006",
        "CPT code(s): 71045",
        "/ES/ A READER",
        "End of Report",
        "Notification: Dr. A was called.",
        "SUMMARY: ABNORMAL, PREVIOUSLY REPORTED",
    ],
)
def test_a_closing_in_flattened_text_needs_no_full_stop_before_it(closing):
    text = f"FINDINGS: Big heart. IMPRESSION: No effusion {closing}"
    assert read(text) == "Big heart. No effusion"


@pytest.mark.parametrize(
    "sentence",
    [
        "ICD in place.",
        "ICD: leads unchanged.",
        "Left ICD: unchanged.",
        "S/p CABG.",
        "Status: improved.",
        "Number: 3 nodules.",
        "Diagnosis of T12 fracture.",
        "Confirmed by CT.",
        "Verified by lateral view, the tip is at T4.",
        "Requested by surgery for a line.",
        "The study was read by the ER as normal.",
        "Nodule previously reported by Dr. A is stable.",
        "Please call if symptoms worsen.",
        "OTHER FINDINGS: Old fracture.",
        "Incidental findings: old fracture.",
        "At 10:11: no change.",
        "The tip of the tube is at the end of the trachea.",
        "Findings were confirmed by CT.",
        "Position verified by auscultation.",
        "I see no pneumothorax.",
        "Note: apices are cut off.",
        "This study was compared with the prior one.",
        "This examination was performed portably.",
        "The attending physician was paged.",
        "Primary diagnostic consideration is pneumonia.",
        "Line placed by radiology is unchanged.",
        "The radiograph was read as normal.",
        "Opacity in the RT lower zone, MD read pending.",
        "Please correlate clinically.",
        "End-stage emphysema.",
    ],
)
def test_a_sentence_that_looks_like_a_closing_stays(sentence):
    for gap in (" ", "\n"):
        text = f"IMPRESSION: Effusion.{gap}{sentence}{gap}No fracture."
        assert cut(text) == {"impression": f"Effusion. {sentence} No fracture."}


def test_a_summary_is_an_impression_where_there_is_no_other():
    assert read("SUMMARY: small effusion, no pneumothorax") == "small effusion, no pneumothorax"
    assert read("FINDINGS: Fluid.\nDIAGNOSIS: Pneumonia.") == "Fluid. Pneumonia."
    assert read("IMPRESSION: Normal.\nSUMMARY: 2-ABNORMAL, PREVIOUSLY REPORTED") == "Normal."
    assert read("IMPRESSION: None.\nSUMMARY: Small effusion.") == "Small effusion."
    assert cut("FINDINGS: Fluid.\nSUMMARY: 2-ABNORMAL") == {"findings": "Fluid."}


def test_a_fuller_section_is_kept_unless_the_other_is_final():
    long, short = "A nodule in the right upper lobe.", "As above."
    assert cut(f"IMPRESSION: {long}\nIMPRESSION: {short}") == {"impression": long}
    assert cut(f"IMPRESSION: {short}\nIMPRESSION: {long}") == {"impression": long}
    rule = "_" * 40
    for between in ("FINAL REPORT", f"{rule}\nFINAL REPORT", rule):
        wet = f"WET READ: Dr. A\nIMPRESSION: {long}\n{between}\nIMPRESSION: {short}"
        assert cut(wet)["impression"] == short
    assert cut(f"IMPRESSION: {long}\n{rule}\nIMPRESSION: {short}")["impression"] == long


def test_an_attestation_before_the_text_is_left_out_alone():
    text = "IMPRESSION:\nI, A. Reader, have reviewed the images.\n\n1. Effusion.\n2. Edema."
    assert cut(text) == {"impression": "Effusion. Edema."}
    assert read("ACCESSION NUMBER: 12\n\nThe lungs are clear. No effusion.").startswith("The lungs")


@pytest.mark.parametrize("empty", ["None.", "nan", "N/A", "NaN", "none", "Not available."])
def test_a_section_of_nothing_is_empty(empty):
    text = f"Findings: {empty} Impression: Small effusion, unchanged."
    assert cut(text) == {"impression": "Small effusion, unchanged."}
    assert read(f"FINDINGS: {empty}\nIMPRESSION: {empty}") == ""
    assert cut("COMPARISON: None.") == {"comparison": "None."}


def test_titles_with_a_date_open_no_findings():
    for day in ("3/4/2006", "03/04/2006 10:11 AM", "March 4, 2006", "4-MAR-2006 1422 hours", "___"):
        for title in ("RADIOGRAPHIC EXAMINATION OF THE CHEST", "CHEST 1 VIEW", "NARRATIVE"):
            text = f"{title}: {day}\n\nHISTORY: Cough.\n\nIMPRESSION: Normal."
            assert cut(text) == {"history": "Cough.", "impression": "Normal."}
            assert cut(f"NARRATIVE: {text}") == {"history": "Cough.", "impression": "Normal."}
        assert cut(f"CHEST 1 VIEW: {day}\n\nThe lungs are clear.") == {
            "findings": "The lungs are clear."
        }


def test_heads_of_the_uk_and_of_chexpert_plus():
    uk = "Clinical notes: Cough.\nReport: The heart is small.\nConclusion: Pneumonia."
    parts = {"history": "Cough.", "findings": "The heart is small.", "impression": "Pneumonia."}
    assert cut(uk) == cut(uk.replace("\n", " ")) == parts
    assert cut("NARRATIVE:\nClear lungs.\n\nIMPRESSION:\nNormal.") == {
        "findings": "Clear lungs.",
        "impression": "Normal.",
    }
    assert "impression" not in cut("FINDINGS: Clear. Clinical Impression: cough.")


def test_heads_in_flattened_text():
    flat = " ".join(CLASSIC.split())
    assert cut(flat) == cut(CLASSIC)
    mixed = "Comparison: None. Findings: The lungs are clear. Impression: No acute disease."
    assert cut(mixed) == {
        "comparison": "None.",
        "findings": "The lungs are clear.",
        "impression": "No acute disease.",
    }


def test_organ_heads_belong_to_the_findings():
    listed = (
        "FINDINGS:\n LUNGS: Clear.\n HEART: Normal size.\n AP CHEST: fine.\n IMPRESSION: Normal."
    )
    assert cut(listed)["findings"] == "LUNGS: Clear. HEART: Normal size. AP CHEST: fine."
    bare = " INDICATION: Cough.\n LUNGS: Clear.\n HEART: Normal size.\n IMPRESSION: Normal."
    assert cut(bare)["findings"] == "LUNGS: Clear. HEART: Normal size."
    assert cut(bare)["indication"] == "Cough."


def test_words_with_colons_are_no_heads():
    text = "FINDINGS: As follows: no effusion. Note: apices are cut off.\n At 10:30 it was: fine."
    assert list(cut(text)) == ["findings"]
    assert cut(text)["findings"].endswith("At 10:30 it was: fine.")


def test_a_head_in_capitals_needs_no_colon_and_swallows_no_sentence():
    parts = {"findings": "The lungs are clear.", "impression": "No edema."}
    for gap in ("\n", " "):
        assert cut(f"FINDINGS The lungs are clear.{gap}IMPRESSION No edema.") == parts
    text = "FINDINGS: HEART NORMAL.\nLUNGS CLEAR. IMPRESSION: NORMAL."
    assert cut(text) == {"findings": "HEART NORMAL. LUNGS CLEAR.", "impression": "NORMAL."}
    text = "CLINICAL IMPRESSION: fluid on the right. FINDINGS: Clear. IMPRESSION: Normal."
    assert read(text) == "Clear. Normal."
    assert cut("FINDINGS: Clear.\nDIAGNOSIS: T12 fracture.")["impression"] == "T12 fracture."


def test_a_wrapped_line_is_no_head():
    text = (
        "FINDINGS: There are several\n findings: a nodule and\n comparison: none.\n impression: x"
    )
    assert cut(text)["findings"].endswith("several findings: a nodule and comparison: none.")
    assert cut(text)["impression"] == "x"


def test_repeated_and_empty_sections():
    text = "IMPRESSION: Preliminary.\nIMPRESSION: Definite words.\nFINDINGS:\nFINDINGS: ___\n"
    assert cut(text) == {"impression": "Definite words."}
    title = "CHEST, PA AND LATERAL: \n\n INDICATION: Cough.\n\n FINDINGS: Clear lungs."
    assert cut(title) == {"indication": "Cough.", "findings": "Clear lungs."}


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("___", ""),
        ("Compared to ___, the lungs are\n clear.", "Compared to, the lungs are clear."),
        ("___-year-old woman with cough.", "year-old woman with cough."),
        ("Seen on ___/___/___ and [**2101-1-1**].", "Seen on and."),
        ("1. No effusion.\n 2. Clear lungs.", "No effusion. Clear lungs."),
        ("1. No effusion\n2. Clear lungs", "No effusion. Clear lungs"),
        ("1) No effusion. 2) Clear lungs.", "No effusion. Clear lungs."),
        ("1. No effusion 2. Clear lungs", "No effusion. Clear lungs"),
        ("1.No effusion.  2.Clear lungs.", "No effusion. Clear lungs."),
        ("- No effusion\n- Clear lungs", "No effusion. Clear lungs"),
        ("A 2.5 cm mass, was 3. Large.", "A 2.5 cm mass, was 3. Large."),
        ("Tip\n 2.5 cm above the carina", "Tip 2.5 cm above the carina"),
        ("Fracture of rib 2. Unchanged.", "Fracture of rib 2. Unchanged."),
        ("Stable.. Notes: clear. . End", "Stable. Notes: clear. End"),
        ("Pneumonia ??  Edema , or !", "Pneumonia? Edema, or!"),
        ("Cough // fever -- chills", "Cough / fever - chills"),
        ("TITLE ()\n\nThe  lungs\xa0are clear\ufffd .", "TITLE. The lungs are clear."),
        ("Under .5 cm", "Under .5 cm"),
        ("ﬁbrosis, 5 cm³", "fibrosis, 5 cm3"),
        ("Bad \udce9 byte", "Bad byte"),
        ("... // --", ""),
        ("No XXXX effusion.", "No effusion."),
        ("XXXX-year-old male, XX/XX/XXXX.", "year-old male."),
        ("XXXX XXXX and XXXX's heart, xxxx.", "and heart."),
        ("Seen [DATE] by <HCW> at [TIME].", "Seen by at."),
        ("[Last Name], [NAME 3], [PERSON_1] [DATE_TIME] left.", "left."),
        ('<PHI TYPE="DATE">12/03</PHI> <unk> <PERSON> {{NAME}} stable', "stable"),
        ("**NAME[AAA BBB] on **DATE[Mar 4] stable", "on stable"),
        ("##/##/#### ##### *** @@@ _ _ _ ■■■ [REDACTED] ok", "ok"),
        ("[DATE]-[DATE] (XXXX) Dr. XXXX.", "Dr."),
        ("xx/xx/xxxx [Dr. Name] <<DATE>> [MEDICAL RECORD NUMBER] **ROOM ok", "ok"),
        ("[1] <5 mm, > 3 mm [left] T-12", "[1] <5 mm, > 3 mm [left] T-12"),
        ("CHEST X-RAY, XX-RAY, segment XXI -> ok", "CHEST X-RAY, XX-RAY, segment XXI -> ok"),
    ],
)
def test_clean(raw, cleaned):
    assert reports.clean(raw) == cleaned


def test_clean_twice_is_clean_once():
    draw = random.Random(0)
    starts = ["", "1. ", "2) ", "- ", "___ ", "\n", "\n\n", " \n 3.  ", "\n(4) "]
    bodies = [
        "No effusion",
        "A 2.5 cm mass // on ___",
        "Dr. ___, at 5 p.m",
        "tubes - ( ) , fine",
        "XXXX on [DATE]-<HCW>",
    ]
    ends = ["", ".", " .", "..", ":", "?", ". ."]
    for _ in range(1000):
        raw = "".join(
            f" {draw.choice(starts)}{draw.choice(bodies)}{draw.choice(ends)}" for _ in "abc"
        )
        once = reports.clean(raw)
        assert "__" not in once
        assert reports.clean(once) == once, raw


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion. Clear lungs.", ["No effusion.", "Clear lungs."]),
        ("Told to Dr. Smith at 3 p.m. today.", ["Told to Dr. Smith at 3 p.m. today."]),
        ("Paged at 3 p.m. No answer.", ["Paged at 3 p.m.", "No answer."]),
        ("Dr. J. Smith called. Fine.", ["Dr. J. Smith called.", "Fine."]),
        ("A 2.5 cm mass. It grew.", ["A 2.5 cm mass.", "It grew."]),
        ("1. No effusion.\n2. A mass of\n 2.5 cm.", ["No effusion.", "A mass of 2.5 cm."]),
        ("1. No effusion\n2. Clear", ["No effusion", "Clear"]),
        ("Clips at T4. Stable.", ["Clips at T4.", "Stable."]),
        (
            "Pneumonia? Probably. (Or edema.) Yes!",
            ["Pneumonia?", "Probably.", "(Or edema.)", "Yes!"],
        ),
        ("heart is normal . no effusion .", ["heart is normal.", "no effusion."]),
        ("Fluid vs. scar, e.g. from surgery.", ["Fluid vs. scar, e.g. from surgery."]),
        ("Line, tube, etc. in place. Good.", ["Line, tube, etc. in place.", "Good."]),
        ("Seen (Fig. 2). Clear.", ["Seen (Fig. 2).", "Clear."]),
        ("No pneumonia.  . ___.", ["No pneumonia."]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert reports.sentences(text) == expected
    ended = [part if part[-1] in ".?!)" else part + "." for part in expected[:-1]]
    assert reports.sentences(reports.clean(text)) == ended + expected[-1:]


def test_token_count():
    assert [reports.token_count(text) for text in ("", ".", "Normal.", "No acute disease.")] == [
        0,
        0,
        1,
        3,
    ]


def test_select_text():
    both = ("findings", "impression")
    assert reports.select_text("A.", "B.", "raw", both) == "A. B."
    assert reports.select_text("A.", "B.", "raw", ("impression", "findings")) == "B. A."
    assert reports.select_text("A.", "B.", "raw", ("impression",)) == "B."
    assert reports.select_text("A.", "", "raw", ("impression",)) == "A."
    assert reports.select_text("", "B.", "raw", ("findings",)) == "B."
    assert reports.select_text("A.", "B.", " all\n of it ", ("report",)) == "all of it"
    assert reports.select_text("A.", "B.", CLASSIC, ("comparison", "impression")) == "None. B."
    assert (
        reports.select_text("", "", "One line.\n\nTwo ___ lines.", both) == "One line. Two lines."
    )
    assert reports.select_text("", "", NO_HEADS, both).startswith("Portable AP radiograph")
    with pytest.raises(UserError, match="'finding' is not one of findings, impression"):
        reports.select_text("A.", "B.", "", ("finding",))


def test_body_of_a_report_without_findings():
    both = ("findings", "impression")
    written = "INDICATION: Cough.\nCOMPARISON: ___. The lungs are clear. No effusion."
    assert reports.select_text("", "", written, both) == "The lungs are clear. No effusion."
    loose = "PRESENTATION: Short of breath. There is patchy opacity in both lungs."
    assert reports.select_text("", "", loose, both).endswith(
        "There is patchy opacity in both lungs."
    )
    assert reports.select_text("", "", "INDICATION: Cough.\nCOMPARISON: None.", both) == ""


def test_real_notes(shared_data):
    with (shared_data / "covid_pairs" / "pairs.csv").open(encoding="utf-8") as stream:
        notes = [row["report"] for row in csv.DictReader(stream)]
    headed = 0
    for note in notes:
        cleaned = reports.clean(note)
        assert reports.clean(cleaned) == cleaned
        assert not any(mark in cleaned for mark in ("__", "..", " .", "  ", "\n"))
        parts = reports.sentences(note)
        assert " ".join(parts) == cleaned
        assert all(len(part) < 700 for part in parts)
        got = cut(note)
        text = reports.select_text(
            got.get("findings", ""), got.get("impression", ""), note, ("findings", "impression")
        )
        assert reports.token_count(text) >= 3
        headed += "findings" in got
        if "Imaging Notes:" in note:
            assert "findings" in got
            assert "Presentation" not in got["findings"]
        elif "findings" not in got:
            assert text in cleaned
    assert headed > 10
