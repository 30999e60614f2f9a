"""The words of the phantom reports for findings: alternatives in braces, slots in <...>."""

from __future__ import annotations

from medsyn_jax.phantom.findings import (
    ATELECTASIS,
    CARDIOMEGALY,
    CONSOLIDATION,
    EDEMA,
    EFFUSION,
    FOREIGN,
    LESION,
    PNEUMOTHORAX,
)

# words for grade 0, 1, 2
GRADES = {
    CARDIOMEGALY: ("{mild|slight|mild}", "moderate", "{severe|marked}"),
    EFFUSION: ("{small|tiny|trace|minimal}", "{moderate|moderate-sized|medium-sized}", "large"),
    PNEUMOTHORAX: ("{small|tiny}", "{moderate|moderate-sized}", "large"),
    CONSOLIDATION: ("{faint|subtle|ill-defined|hazy}", "{moderate|patchy|}", "{dense|extensive}"),
    EDEMA: ("mild", "moderate", "{severe|marked}"),
    ATELECTASIS: ("{mild|minimal|minor}", "{moderate|}", "{marked|substantial|prominent}"),
    LESION: ("{small|subtle|tiny}", "{rounded|well-defined|}", "{large|lobulated}"),
    FOREIGN: ("", "", ""),
}
DEGREES = ("{mildly|slightly}", "moderately", "{severely|markedly}")

ZONES = {
    "upper": "{upper lobe|upper lung|upper lung zone|upper zone|lung apex}",
    "mid": "{mid lung|mid lung zone|mid zone|midlung|perihilar region}",
    "lower": "{lower lobe|lung base|lower lung|base|lower lung zone}",
}

FOREIGN_NAMES = {
    "coin": "{coin|round metallic object|metallic disc|coin-shaped density}",
    "button": "{button|round density with holes, likely a button,|button-like density}",
    "pin": "{safety pin|open metallic pin}",
    "necklace": "{necklace|beaded chain|metallic necklace with a pendant}",
    "bullet": "{bullet|bullet fragment|oval metallic fragment|ballistic fragment}",
    "key": "{key|metallic key|key-shaped metallic object}",
}

HEARTS = {
    "PA": (
        "{The heart|Heart size|Cardiac silhouette} is {normal|within normal limits}.",
        "{Cardiomediastinal silhouette is {normal|unremarkable|within normal limits}|"
        "The cardiac and mediastinal silhouettes are {normal|unremarkable}}.",
        "{The heart is not enlarged|No cardiomegaly|Normal heart size|Heart is normal in size}.",
    ),
    "AP": (
        "Heart size is {normal|within normal limits} allowing for {AP|portable} technique.",
        "{The heart is not enlarged|No cardiomegaly|Normal heart size|Heart is normal in size}.",
        "Cardiomediastinal silhouette is {normal|unremarkable|stable|within normal limits}.",
    ),
    "upper": (
        "Heart size is {top normal|at the upper limits of normal|top-normal}.",
        "The {cardiac silhouette|heart} is {within normal limits|top normal in size}.",
        "{The heart is not enlarged|Heart size is normal}.",
    ),
}

LUNGS_CLEAR = (
    "{The lungs are|Lungs are|Both lungs are} {clear|grossly clear|essentially clear}.",
    "The lungs are {clear|well aerated} without focal {abnormality|opacity}.",
    "{No focal {airspace opacity|parenchymal abnormality}|The lung fields are clear}.",
)

# chance that the absence of a finding is told, and how
ABSENT = {
    EFFUSION: 0.75, PNEUMOTHORAX: 0.8, CONSOLIDATION: 0.65, EDEMA: 0.4, LESION: 0.06,
    ATELECTASIS: 0.05,
}  # fmt: skip
DENIALS = {
    EFFUSION: "{pleural effusion|effusion}",
    PNEUMOTHORAX: "pneumothorax",
    CONSOLIDATION: "{focal consolidation|consolidation|airspace consolidation|pneumonia}",
    EDEMA: "{pulmonary edema|edema|overt pulmonary edema|vascular congestion}",
    LESION: "{suspicious nodule|pulmonary nodule|lung mass}",
    ATELECTASIS: "atelectasis",
}
NEGATIONS = (
    "No <names>{| is seen| is identified| is present| is detected}.",
    "There is no {|evidence of |definite }<names>.",
    "{No evidence of|Negative for} <names>.",
)

# by the kind of a finding ('' for any), 'both' sides alike, 'each' side its grade, 'more' foci
FINDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    CARDIOMEGALY: {
        "": (
            "{There is <grade>|<grade>} {cardiomegaly|enlargement of the cardiac silhouette}.",
            "{The heart|The cardiac silhouette|Heart size} is <degree> enlarged.",
            "<grade> {cardiac enlargement|cardiomegaly} {is present|is noted|is seen}.",
        ),
    },
    EFFUSION: {
        "": (
            "{There is a|A|} <grade> <side> pleural effusion.",
            "<grade> <side> pleural effusion {is present|is noted|is seen}.",
            "<grade> <side> {pleural effusion|effusion} {blunting|obscuring} the <side>"
            " costophrenic angle.",
            "<grade> {amount of|volume of} <side> pleural fluid.",
        ),
        "layering": (
            "{There is a|A|} <grade> layering <side> pleural effusion.",
            "Hazy{| veil-like} opacity over the <side> {hemithorax|lung}, {likely|compatible with}"
            " a <grade> layering effusion.",
        ),
        "both": (
            "{There are|} <grade> bilateral pleural effusions.",
            "Bilateral <grade> {pleural effusions are seen|effusions blunt the costophrenic"
            " angles}.",
        ),
        "each": (
            "Bilateral pleural effusions, <right> on the right and <left> on the left.",
            "<right> right and <left> left pleural {effusions|effusion}.",
        ),
    },
    PNEUMOTHORAX: {
        "": (
            "{There is a|A|} <grade> <side> pneumothorax.",
            "<grade> <side> pneumothorax {is present|is seen|with partial collapse of the <side>"
            " lung}.",
            "<grade> pneumothorax {on the <side>|is seen on the <side>}.",
        ),
        "apical": (
            "{There is a|A|} <grade> <side> apical pneumothorax.",
            "<grade> pneumothorax at the <side> apex{| with a {thin|visible} pleural line}.",
            "Thin visceral pleural line at the <side> apex, {compatible|consistent} with a <grade>"
            " pneumothorax.",
        ),
        "tension": (
            "{There is a|} large <side> pneumothorax with {shift of the mediastinum to the <other>|"
            "mediastinal shift to the <other>}{|, concerning for tension}.",
        ),
    },
    CONSOLIDATION: {
        "": (
            "{There is|} <grade> {consolidation|airspace consolidation|airspace opacity} in the"
            " <zone>.",
            "<grade> <place> {lung|zone} {consolidation|airspace opacity}{| is seen| is noted|,"
            " {concerning|worrisome|suspicious} for pneumonia}.",
            "<grade> {focal opacity|consolidation|opacity} {projects over|is seen in} the <zone>"
            "{|, {likely|compatible with|suggesting|most likely} pneumonia}.",
        ),
        "lobar": (
            "<grade> {consolidation|lobar consolidation} {of|in} the right upper lobe, bordered by"
            " the minor fissure.",
            "{There is|} <grade> right upper lobe {consolidation|pneumonia}.",
        ),
        "more": (
            "{Additional|A second|Further} <grade> {opacity|consolidation|focus} in the <zone>.",
            "{Also|Similarly}, <grade> {consolidation|opacity} in the <zone>.",
            "<grade> {opacity|airspace opacity} is also {seen|present} in the <zone>.",
        ),
    },
    EDEMA: {
        "interstitial": (
            "{There is|} <grade> {interstitial|pulmonary interstitial} edema{|, Kerley B lines}.",
            "<grade> {pulmonary vascular congestion and interstitial edema|interstitial pulmonary"
            " edema}.",
            "Diffuse {interstitial|reticular} opacities {consistent|compatible} with <grade>"
            " {pulmonary edema|edema}.",
        ),
        "alveolar": (
            "{There is|} <grade> {pulmonary|alveolar} edema{| in a perihilar distribution}.",
            "{Bilateral perihilar|Symmetric perihilar} opacities {consistent|compatible} with"
            " <grade> {pulmonary edema|edema}.",
            "<grade> {pulmonary|airspace} edema{| with indistinct vessels| is present}.",
        ),
    },
    ATELECTASIS: {
        "linear": (
            "{There is|} <grade> {linear|platelike|subsegmental|band-like} atelectasis {in|at} the"
            " <zone>.",
            "{Linear|Band-like} {opacity|density} {in|at} the <zone> {likely represents|reflects|"
            "represents} <grade> atelectasis.",
        ),
        "basal": (
            "{There is|} <grade> <side> {basilar|basal|lower lobe} atelectasis{| with elevation of"
            " the <side> hemidiaphragm| with volume loss}.",
            "<grade> {volume loss and atelectasis|atelectasis} at the <side> {lung base|base}.",
        ),
        "both": (
            "{There is|} <grade> {bibasilar|bilateral|bibasal} atelectasis.",
            "<grade> atelectatic changes {at|in} {both lungs|both bases|the lung bases}.",
        ),
    },
    LESION: {
        "nodule": (
            "{There is a|} <grade> {|<size> cm} {nodule|pulmonary nodule|nodular opacity} in the"
            " <zone>.",
            "<grade> {|<size> cm} <place> {lung|zone} nodule{| is seen| is noted}.",
            "A {|<size> cm} {nodule|nodular density} {projects over|overlies} the <zone>.",
        ),
        "mass": (
            "{There is a|} <grade> {|<size> cm} {mass|lung mass|mass-like opacity} in the <zone>.",
            "<grade> {|<size> cm} <place> {lung|zone} mass{| is seen| is noted|, concerning for"
            " malignancy}.",
        ),
    },
    FOREIGN: {
        "": (
            "{A|} <object> {projects over|overlies} the <zone>.",
            "There is a <object> {projecting|superimposed} over the <zone>{|, likely external to"
            " the patient}.",
            "Note is made of a <object> over the <zone>.",
        ),
        "necklace": (
            "{A|} <object> {overlies|projects over} the {lower neck|upper chest}.",
            "There is a <object> {superimposed|projecting} over the upper {chest|mediastinum}.",
        ),
    },
}

# a faint finding that the reader leaves open
OPEN = {
    CARDIOMEGALY: (
        "{The heart may be {mildly|slightly} enlarged|Possible mild cardiomegaly}.",
        "Heart size is {borderline|difficult to assess, possibly enlarged}.",
    ),
    EFFUSION: (
        "{A|} {small|trace} <side> pleural effusion {cannot be|is not} excluded.",
        "{Possible|Questionable} {small|trace|tiny} <side> pleural effusion.",
        "{Slight|Minimal} blunting of the <side> costophrenic angle {may reflect|may be due to} a"
        " {trace|small} effusion.",
    ),
    PNEUMOTHORAX: (
        "{Possible|Questionable} {tiny|small} <side> apical pneumothorax.",
        "A {tiny|small} <side>{| apical} pneumothorax {cannot be|is not} excluded.",
    ),
    CONSOLIDATION: (
        "{Subtle|Faint|Vague} opacity in the <zone> {may represent|could reflect} {early|}"
        " pneumonia.",
        "{Possible|Questionable} {early|faint} consolidation in the <zone>.",
    ),
    EDEMA: (
        "{Possible|Questionable} {mild|minimal|early} {interstitial|pulmonary} edema.",
        "{Mild|Slight} prominence of the {interstitium|vessels} {may represent|could reflect} early"
        " edema.",
    ),
    ATELECTASIS: (
        "{Possible|Questionable} {minimal|mild} atelectasis {in|at} the <zone>.",
        "{Faint|Subtle} opacity {in|at} the <zone> {may represent|could be} atelectasis.",
    ),
    LESION: (
        "{Possible|Questionable} {small|subtle} nodule in the <zone>.",
        "{Faint|Subtle} {nodular|rounded} density {over|in} the <zone> {may represent|could be} a"
        " nodule{| or a vessel on end}.",
    ),
}

IMPRESSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    CARDIOMEGALY: {"": ("<grade> cardiomegaly.", "<degree> enlarged {heart|cardiac silhouette}.")},
    EFFUSION: {
        "": ("<grade> <side> pleural effusion.", "<side> pleural effusion, <grade>."),
        "both": ("Bilateral {pleural effusions|effusions}.", "Pleural effusions bilaterally."),
    },
    PNEUMOTHORAX: {
        "": ("<grade> <side> pneumothorax.", "<side> pneumothorax, <grade>."),
        "apical": ("<grade> <side>{| apical} pneumothorax.",),
        "tension": ("Large <side> pneumothorax with {signs of tension|mediastinal shift}.",),
    },
    CONSOLIDATION: {
        "": (
            "<zone> {consolidation|pneumonia|consolidation concerning for pneumonia}.",
            "<grade> <zone> {opacity|consolidation}, {likely|concerning for} pneumonia.",
        ),
        "many": (
            "Multifocal {pneumonia|consolidation|airspace opacities concerning for pneumonia}.",
            "{Multifocal|Several} consolidations, most marked in the <zone>.",
        ),
    },
    EDEMA: {"": ("<grade> {pulmonary edema|edema}.", "Findings consistent with <grade> edema.")},
    ATELECTASIS: {
        "": ("<grade> atelectasis {in|at} the <zone>.", "<zone> atelectasis."),
        "both": ("{Bibasilar|Bilateral} atelectasis.", "<grade> bilateral atelectasis."),
    },
    LESION: {
        "": ("<grade> <zone> nodule.", "<zone> {pulmonary nodule|nodule}{|, indeterminate}."),
        "mass": ("<zone> mass{|, concerning for malignancy}.", "<grade> mass in the <zone>."),
        "many": ("{Several|Multiple} {pulmonary|lung} nodules, the largest in the <zone>.",),
    },
    FOREIGN: {
        "": ("<object> over the <zone>.", "Foreign object projecting over the <zone>: <object>."),
        "necklace": ("<object> over the upper chest.", "{External jewelry|Overlying necklace}."),
        "many": ("{External|Foreign|Radiopaque} objects project over the chest.",),
    },
}

OPEN_IMPRESSIONS = {
    CARDIOMEGALY: "{Possible|Borderline} cardiomegaly.",
    EFFUSION: "Possible {trace|small} <side> pleural effusion.",
    PNEUMOTHORAX: "{Possible|Cannot exclude a} {tiny|small} <side> pneumothorax.",
    CONSOLIDATION: "{Possible|Cannot exclude} {early|} <zone> pneumonia.",
    EDEMA: "Possible {mild|early} {pulmonary edema|edema}.",
    ATELECTASIS: "Possible {minimal|} atelectasis {in|at} the <zone>.",
    LESION: "{Possible|Questionable} <zone> nodule.",
}

RESOLVED = {
    EFFUSION: "{The previously|Previously} {seen|noted} {pleural effusion|effusion} has resolved.",
    PNEUMOTHORAX: "The previously {seen|noted} pneumothorax has {resolved|re-expanded}.",
    CONSOLIDATION: "Previously {seen|noted} {consolidation|opacity} has {cleared|resolved}.",
    EDEMA: "The previously {seen|noted} {pulmonary edema|edema} has {resolved|cleared}.",
    ATELECTASIS: "{The previously|Previously} {seen|noted} atelectasis has {cleared|resolved}.",
}
CHANGES = {
    True: "{similar to prior|not significantly changed|unchanged|as before}",
    False: "{new since the prior study|new from prior|not seen on the prior study}",
}

CLOSING = {
    "normal": (
        "No acute {cardiopulmonary|intrathoracic|cardiothoracic} {process|abnormality|findings}.",
        "No{| radiographic} evidence of acute {cardiopulmonary|intrathoracic} {process|disease}.",
        "{No acute disease|No acute findings in the chest|No acute chest abnormality}.",
    ),
    "otherwise": ("No other acute {process|abnormality}.", "Otherwise unremarkable study."),
    "advice": (
        "{Follow-up|Repeat} radiographs {are recommended|in ___ weeks}{| to document resolution}.",
        "{Findings|Results} were {discussed with|communicated to} Dr. ___{| by telephone} at ___.",
        "{Clinical correlation is recommended|Correlate clinically}.",
        "{CT|Chest CT} {is recommended|may be helpful|could be obtained} for further evaluation.",
    ),
}
