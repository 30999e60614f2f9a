"""The phrase book of the phantom reports: alternatives in braces, slots in angle brackets."""

from __future__ import annotations

from medsyn_jax.data.findings import (
    ATELECTASIS,
    CARDIOMEGALY,
    CONSOLIDATION,
    EDEMA,
    EFFUSION,
    FOREIGN,
    LESION,
    PNEUMOTHORAX,
)

GRADES = {
    CARDIOMEGALY: ("{mild|mildly increased}", "moderate", "{severe|marked}"),
    EFFUSION: ("{small|tiny|trace}", "{moderate|moderate-sized}", "{large|large}"),
    PNEUMOTHORAX: ("{small|tiny|small}", "{moderate|moderate-sized}", "large"),
    CONSOLIDATION: ("{faint|subtle|ill-defined|hazy}", "{moderate|patchy|}", "{dense|extensive}"),
    EDEMA: ("mild", "moderate", "{severe|marked}"),
    ATELECTASIS: ("{mild|minimal|minor}", "{moderate|}", "{marked|substantial|prominent}"),
    LESION: ("{small|subtle|tiny}", "{rounded|well-defined|}", "{large|lobulated}"),
    FOREIGN: ("", "", ""),
}

ZONES = {
    "right": {
        "upper": "right {upper lobe|upper lung|upper lung zone|upper zone}",
        "mid": "right {mid lung|mid lung zone|middle lobe|mid zone|perihilar region}",
        "lower": "right {lower lobe|lung base|lower lung|base}",
    },
    "left": {
        "upper": "left {upper lobe|upper lung|upper lung zone|upper zone}",
        "mid": "left {mid lung|mid lung zone|lingula|mid zone|perihilar region}",
        "lower": "left {lower lobe|lung base|lower lung|base}",
    },
    "both": {"upper": "upper lungs", "mid": "mid lungs", "lower": "{lung bases|lower lobes}"},
}

FOREIGN_NAMES = {
    "coin": "{coin|round metallic object|metallic disc|coin-shaped metallic density}",
    "button": "{button|round object with holes, likely a button|button-like density}",
    "pin": "{safety pin|open metallic pin|safety pin}",
    "necklace": "{necklace|beaded chain|metallic necklace with a pendant}",
    "bullet": "{bullet|metallic fragment|ballistic fragment}",
    "key": "{key|metallic key|key-shaped metallic object}",
}

EXAMS = {
    "PA": "{CHEST (PA)|Chest radiograph, PA view|CHEST, PA UPRIGHT|Frontal chest radiograph, PA}",
    "AP": "{CHEST (PORTABLE AP)|Portable AP chest radiograph|CHEST (AP)|CHEST PORT. LINE PLACEMENT}",
}

HISTORY = (
    "<who> with {shortness of breath|dyspnea|chest pain|cough|fever|hypoxia|weakness|syncope}.",
    "<who> with {cough and fever|chest pain and dyspnea|altered mental status|leukocytosis}."
    " {Evaluate for pneumonia|Eval for acute process|Assess for infiltrate}.",
    "<who> {status post fall|status post surgery|with history of ___|with CHF|with COPD}."
    " {Evaluate for interval change|Please assess|Rule out pneumothorax|?acute process}.",
    "<who>, {preoperative evaluation|routine examination|annual check|___}.",
)

PRIORS = {
    False: ("None.", "None available.", "No prior studies are available for comparison."),
    True: ("Chest radiograph from ___.", "___.", "Prior radiograph dated ___.", "Chest x-ray ___."),
}

COMPARISONS = {
    "PA": (
        "{PA|Frontal PA|Single PA|Upright PA} view of the chest {was obtained|is provided|}.",
        "{Single frontal upright|Upright frontal|PA} {radiograph|view} of the chest.",
        "{Standing|Upright} PA {radiograph|projection} {was reviewed|}.",
    ),
    "AP": (
        "{Portable|Single portable|Semi-upright portable} AP view of the chest {was obtained|}.",
        "{AP portable|Bedside AP|Supine AP} {radiograph|view} of the chest.",
        "{Bedside|Portable} {radiograph|examination} in AP projection {was reviewed|}.",
    ),
}

BACKGROUND = {
    "low": "{Lung volumes are {low|reduced|diminished}|Low lung volumes|The inspiratory effort is"
    " {poor|low}|There are low lung volumes} {with bronchovascular crowding|accentuating the"
    " bronchovascular markings|}.",
    "full": "{The lungs are well expanded|The lungs are well inflated|Lung volumes are normal|"
    "Good inspiratory effort}.",
    "hyperinflated": "{The lungs are hyperinflated|Hyperinflated lungs|Lungs are hyperexpanded}"
    " {with flattening of the diaphragms|{suggesting|compatible with} COPD|}.",
    "rotated": "{The patient is {rotated|turned} to the <side>|There is patient rotation to the"
    " <side>|Study is limited by rotation to the <side>|<side>ward patient rotation is noted}.",
    "dark": "The {film|image|radiograph} is {overpenetrated|overexposed|somewhat dark}.",
    "pale": "The {film|image|radiograph} is {underpenetrated|underexposed|somewhat pale}.",
    "aorta": "{The aorta is {tortuous|unfolded|ectatic}|There is a {tortuous|prominent} thoracic"
    " aorta|The aortic knob is {prominent|enlarged}|Unfolding of the thoracic aorta}.",
    "scoliosis": "{There is <grade> <name>scoliosis {of the thoracic spine|}|<grade> thoracic"
    " scoliosis, convex to the <side>|<grade> <name>scoliosis is noted}.",
    "habitus": "{Evaluation is limited by {body habitus|overlying soft tissues}|Large body habitus"
    " {limits the study|}|Overlying soft tissue attenuates the bases}.",
    "supine": "The {patient's arms are|arms are} at the sides.",
}

INCIDENTAL = (
    "{There are|Mild} degenerative changes {of|in} the {thoracic spine|spine|shoulders}.",
    "{Gas|Air} is {seen|noted} in the {stomach|gastric fundus}.",
    "{The bones are diffusely demineralized|Bones appear osteopenic}.",
    "Assessment of the {apices|bases} is {somewhat|slightly} limited by technique.",
    "{Clips|Cholecystectomy clips} are {not seen|not included} on this {study|film}.",
)

_ETT = "{Endotracheal tube|ET tube|The endotracheal tube}"
_NGT = "{Enteric tube|Nasogastric tube|NG tube|Orogastric tube}"
_JUG = "{<side> {internal jugular|IJ} {central venous catheter|central line|line}}"
_PICC = "{<side> {PICC|PICC line|upper extremity PICC}}"
_PORT = "{<side> {chest wall port|Port-A-Cath|chest port|port-a-cath}}"
_PACER = (
    "{<side> {chest wall|-sided|pectoral|} {pacemaker|pacer|pacing device|pacemaker generator}}"
)
_WIRES = (
    "{Median sternotomy wires {are intact|are noted|are in place|are aligned}|The patient is status"
    " post median sternotomy|Sternotomy wires {are seen|are present}}."
)
_DRAIN = "{<side> {chest tube|pleural drain|thoracostomy tube} {is in place|is seen|projects over"
_TIPS = {
    "high": "{in the upper SVC|in the proximal SVC}",
    "mid": "in the mid {SVC|superior vena cava}",
    "low": "{at the cavoatrial junction|in the lower SVC|in the distal SVC}",
}
DEVICES = {
    "ett": {
        "high": f"{_ETT} {{tip is {{high, |}} {{6|7}} cm above the carina|terminates high in the trachea}}.",
        "mid": f"{_ETT} {{tip is {{4|5}} cm above the carina|is in {{standard|satisfactory}} position}}.",
        "low": f"{_ETT} {{tip is low, {{1|2}} cm above the carina|terminates near the carina}}.",
    },
    "ngt": {
        tip: f"{_NGT} {{courses below the diaphragm|{{terminates|ends}} in the stomach|"
        "{{extends|passes}} into the stomach}}.".replace("{{", "{").replace("}}", "}")
        for tip in _TIPS
    },
    "jugular": {tip: f"{_JUG} {{tip is|terminates|ends}} {place}." for tip, place in _TIPS.items()},
    "picc": {tip: f"{_PICC} {{tip is|terminates|ends}} {place}." for tip, place in _TIPS.items()},
    "port": {tip: f"{_PORT} {{tip is|terminates|ends}} {place}." for tip, place in _TIPS.items()},
    "pacemaker": {
        "high": f"{_PACER} with {{a single lead|single lead}} {{in the right ventricle|}}.",
        "mid": f"{_PACER} {{with two leads|with leads in the right atrium and right ventricle}}.",
        "low": f"{_PACER} {{with dual leads|with leads in {{expected|unchanged}} position}}.",
    },
    "wires": dict.fromkeys(_TIPS, _WIRES),
    "chest tube": dict.fromkeys(_TIPS, _DRAIN + " the <side> hemithorax}}."),
}

HEARTS = {
    "PA": (
        "{The heart|Heart size|Cardiac silhouette|The heart size} is {normal|within normal limits}.",
        "{Cardiomediastinal silhouette is {normal|unremarkable|within normal limits}|"
        "The cardiac and mediastinal silhouettes are {normal|unremarkable}}.",
        "{The heart is not enlarged|No cardiomegaly|Normal heart size|Heart is normal in size}.",
    ),
    "AP": (
        "{Heart size is {normal|within normal limits} allowing for {AP|portable} technique}.",
        "{The heart is not enlarged|No cardiomegaly|Normal heart size|Heart is normal in size}.",
        "{Cardiomediastinal silhouette is {normal|unremarkable|stable|within normal limits}}.",
    ),
    "upper": (
        "{Heart size is {top normal|at the upper limits of normal|top-normal}}.",
        "The {cardiac silhouette|heart} is {within normal limits|top normal in size}.",
        "{The heart is not enlarged|Heart size is normal}.",
    ),
}

LUNGS_CLEAR = (
    "{The lungs are|Lungs are|Both lungs are} {clear|grossly clear|essentially clear}.",
    "{The lungs are {clear|well aerated} without focal {abnormality|opacity}}.",
    "{No focal {airspace opacity|parenchymal abnormality}|The lung fields are clear}.",
)

# chance that the absence of a finding is told
ABSENT = {
    EFFUSION: 0.75,
    PNEUMOTHORAX: 0.8,
    CONSOLIDATION: 0.65,
    EDEMA: 0.4,
    LESION: 0.06,
    ATELECTASIS: 0.05,
}
DENIALS = {
    EFFUSION: "{pleural effusion|effusion|pleural effusion|large effusion}",
    PNEUMOTHORAX: "pneumothorax",
    CONSOLIDATION: "{focal consolidation|consolidation|airspace consolidation|pneumonia}",
    EDEMA: "{pulmonary edema|edema|overt pulmonary edema|vascular congestion}",
    LESION: "{suspicious nodule|pulmonary nodule|lung mass}",
    ATELECTASIS: "atelectasis",
}

FINDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    CARDIOMEGALY: {
        "": (
            "{There is|} <grade> {cardiomegaly|enlargement of the cardiac silhouette}.",
            "{The heart is|The cardiac silhouette is} <ly> enlarged.",
            "Heart size is <ly> {increased|enlarged}.",
            "<grade> {cardiac enlargement|cardiomegaly} {is present|is noted|is seen}.",
        ),
    },
    EFFUSION: {
        "": (
            "{There is a|} <grade> <side> pleural effusion {is present|is noted|}.",
            "<grade> <side> {pleural effusion|effusion} {blunting|obscuring} the <side>"
            " costophrenic angle.",
            "{A|} <grade> {amount of|} <side> pleural {effusion|fluid} {is seen|is present}.",
        ),
        "layering": (
            "{There is a|} <grade> layering <side> pleural effusion {with hazy opacification of the"
            " hemithorax|}.",
            "Hazy {veil-like|} opacity over the <side> {hemithorax|lung}, {likely|compatible with}"
            " a <grade> layering effusion.",
        ),
        "both": (
            "{There are|} <grade> bilateral pleural effusions {are present|}.",
            "Bilateral <grade> {pleural effusions|effusions} {are seen|blunt the costophrenic"
            " angles}.",
        ),
        "each": (
            "Bilateral pleural effusions, <right> on the right and <left> on the left.",
            "{There is a|} <right> right and {a|} <left> left pleural effusion.",
        ),
    },
    PNEUMOTHORAX: {
        "": (
            "{There is a|} <grade> <side> pneumothorax {is present|is seen|}.",
            "<grade> <side> pneumothorax {with {partial|} collapse of the <side> lung|}.",
            "{A|} <grade> {pneumothorax|pneumothorax is seen} {on the|at the} <side>.",
        ),
        "apical": (
            "{There is a|} <grade> <side> apical pneumothorax {is present|is seen|}.",
            "<grade> pneumothorax at the <side> apex {with a {thin|visible} pleural line|}.",
            "{A thin|} visceral pleural line at the <side> apex, {a|compatible with a|consistent"
            " with a} <grade> pneumothorax.",
        ),
        "tension": (
            "{There is a|} large <side> pneumothorax with {shift of the mediastinum to the <other>|"
            "mediastinal shift to the <other>}{, concerning for tension|}.",
        ),
    },
    CONSOLIDATION: {
        "": (
            "{There is|} <grade> {consolidation|airspace consolidation|airspace opacity} in the"
            " <zone>.",
            "<grade> <place> {lung|zone} {consolidation|airspace opacity} {is seen|is noted|}"
            "{, {concerning|worrisome|suspicious} for pneumonia|}.",
            "{A|} <grade> {focal|} {opacity|consolidation} {projects over|is seen in|in} the <zone>"
            "{, {likely|compatible with|suggesting|most likely} pneumonia|}.",
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
            "{There is|} <grade> {interstitial|pulmonary interstitial} edema {with Kerley B lines|}.",
            "<grade> {pulmonary vascular congestion and interstitial edema|interstitial pulmonary"
            " edema}.",
            "Diffuse {interstitial|reticular} opacities {consistent|compatible} with <grade>"
            " {pulmonary|} edema.",
        ),
        "alveolar": (
            "{There is|} <grade> {pulmonary|alveolar} edema {in a perihilar distribution|}.",
            "{Bilateral perihilar|Symmetric perihilar} opacities {consistent|compatible} with"
            " <grade> {pulmonary|} edema.",
            "<grade> {pulmonary|airspace} edema {with indistinct vessels|is present|}.",
        ),
    },
    ATELECTASIS: {
        "linear": (
            "{There is|} <grade> {linear|platelike|subsegmental|band-like} atelectasis {in|at} the"
            " <zone>.",
            "{Linear|Band-like} {opacity|opacities} {in|at} the <zone> {likely|} {represent|reflect}"
            " <grade> atelectasis.",
        ),
        "basal": (
            "{There is|} <grade> <side> {basilar|basal|lower lobe} atelectasis {with elevation of the"
            " <side> hemidiaphragm|with volume loss|}.",
            "<grade> {volume loss and atelectasis|atelectasis} at the <side> {lung base|base}.",
        ),
        "both": (
            "{There is|} <grade> {bibasilar|bilateral|bibasal} atelectasis.",
            "<grade> atelectatic changes {at|in} {both lungs|both bases|the lung bases}.",
        ),
    },
    LESION: {
        "nodule": (
            "{There is a|} <grade> {<size> cm|} {nodule|pulmonary nodule|nodular opacity} in the"
            " <zone>.",
            "{A|} <grade> {<size> cm|} <place> {lung|zone} nodule {is seen|is noted|}.",
            "{A|} {<size> cm|} {nodule|nodular density} {projects over|overlies} the <zone>.",
        ),
        "mass": (
            "{There is a|} <grade> {<size> cm|} {mass|lung mass|mass-like opacity} in the <zone>.",
            "{A|} <grade> {<size> cm|} <place> {lung|zone} mass {is seen|is noted|, concerning for"
            " malignancy|}.",
        ),
    },
    FOREIGN: {
        "": (
            "{A|} <object> {projects over|overlies} the <zone>.",
            "{There is a|} <object> {projecting|superimposed} over the <zone>{, likely external to"
            " the patient|}.",
            "{Note is made of a|} <object> over the <zone>.",
        ),
        "necklace": (
            "{A|} <object> {overlies|projects over} the {lower neck|upper mediastinum|upper chest}.",
            "{There is a|} <object> {superimposed|projecting} over the upper {chest|mediastinum}.",
        ),
    },
}

OPEN = {
    CARDIOMEGALY: (
        "{The heart may be {mildly|slightly} enlarged|Possible mild cardiomegaly}.",
        "Heart size is {borderline|difficult to assess, possibly enlarged}.",
    ),
    EFFUSION: (
        "{A|} {small|trace} <side> pleural effusion {cannot be excluded|is not excluded}.",
        "{Possible|Questionable} {small|trace|tiny} <side> pleural effusion.",
        "{Slight|Minimal} blunting of the <side> costophrenic angle {may reflect|may be due to} a"
        " {trace|small} effusion.",
    ),
    PNEUMOTHORAX: (
        "{Possible|Questionable} {tiny|small} <side> apical pneumothorax.",
        "A {tiny|small} <side> {apical|} pneumothorax {cannot be excluded|is not excluded}.",
    ),
    CONSOLIDATION: (
        "{Subtle|Faint|Vague} opacity in the <zone> {may represent|could reflect} {early|} pneumonia.",
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
        " nodule {or a vessel on end|}.",
    ),
    FOREIGN: (
        "{Possible|Questionable} {foreign object|external object} over the {chest|thorax}.",
        "{Density over the {chest|thorax} {may be|could be} an external object}.",
    ),
}

IMPRESSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    CARDIOMEGALY: {"": ("<grade> cardiomegaly.", "<ly> enlarged {heart|cardiac silhouette}.")},
    EFFUSION: {
        "": ("<grade> <side> pleural effusion.", "<side> pleural effusion, <grade>."),
        "both": (
            "Bilateral pleural effusions.",
            "{Bilateral effusions|Pleural effusions bilaterally}.",
        ),
    },
    PNEUMOTHORAX: {
        "": ("<grade> <side> pneumothorax.", "<side> pneumothorax, <grade>."),
        "apical": ("<grade> <side> {apical|} pneumothorax.",),
        "tension": ("Large <side> pneumothorax {with signs of tension|with mediastinal shift}.",),
    },
    CONSOLIDATION: {
        "": (
            "<zone> {consolidation|pneumonia|consolidation concerning for pneumonia}.",
            "<grade> <zone> {opacity|consolidation}, {likely|concerning for|suspicious for} pneumonia.",
        ),
        "many": (
            "Multifocal {pneumonia|consolidation|airspace opacities concerning for pneumonia}.",
            "{Multifocal|Several} consolidations, most marked in the <zone>.",
        ),
    },
    EDEMA: {
        "": (
            "<grade> {pulmonary|} edema.",
            "{Findings of|Findings consistent with} <grade> pulmonary edema.",
        )
    },
    ATELECTASIS: {
        "": ("<grade> atelectasis {in|at} the <zone>.", "<zone> atelectasis."),
        "both": ("{Bibasilar|Bilateral} atelectasis.", "<grade> bilateral atelectasis."),
    },
    LESION: {
        "": ("<grade> <zone> nodule.", "<zone> {pulmonary|} nodule{, {indeterminate|<size> cm}|}."),
        "mass": ("<zone> mass{, concerning for malignancy|}.", "<grade> mass in the <zone>."),
        "many": ("{Several|Multiple} {pulmonary|} nodules, the largest in the <zone>.",),
    },
    FOREIGN: {
        "": (
            "<object> over the <zone>.",
            "Foreign object ({<object>}) projecting over the <place> {chest|lung}.",
        ),
        "necklace": ("<object> over the upper chest.", "{External jewelry|Overlying necklace}."),
        "many": ("{External|Foreign|Radiopaque} objects project over the chest.",),
    },
}

OPEN_IMPRESSIONS = {
    CARDIOMEGALY: ("{Possible|Borderline} {mild|} cardiomegaly.",),
    EFFUSION: ("Possible {trace|small} <side> pleural effusion.",),
    PNEUMOTHORAX: ("{Possible|Cannot exclude a} {tiny|small} <side> pneumothorax.",),
    CONSOLIDATION: ("{Possible|Cannot exclude} {early|} <zone> pneumonia.",),
    EDEMA: ("Possible {mild|early} {pulmonary|} edema.",),
    ATELECTASIS: ("Possible {minimal|} atelectasis {in|at} the <zone>.",),
    LESION: ("{Possible|Questionable} <zone> nodule.",),
    FOREIGN: ("Possible external object over the chest.",),
}

RESOLVED = {
    EFFUSION: "{The|} previously {seen|noted} {pleural effusion|effusion} has resolved.",
    PNEUMOTHORAX: "{The|} previously {seen|noted} pneumothorax has {resolved|re-expanded}.",
    CONSOLIDATION: "Previously {seen|noted} {consolidation|opacity} has {cleared|resolved}.",
    EDEMA: "{Pulmonary edema|Edema} has {resolved|cleared} since the previous study.",
    ATELECTASIS: "{The|} previously {seen|noted} atelectasis has {cleared|resolved}.",
}

CLOSING = {
    "normal": (
        "No acute {cardiopulmonary|intrathoracic|cardiothoracic} {process|abnormality|findings}.",
        "No {radiographic|} evidence of acute {cardiopulmonary|intrathoracic} {process|disease}.",
        "{No acute disease|No acute findings in the chest|No acute chest abnormality}.",
    ),
    "otherwise": (
        "No other acute {process|abnormality}.",
        "Otherwise {unremarkable|unchanged} {study|examination|}.",
    ),
    "advice": (
        "{Follow-up|Repeat} radiographs {are recommended|in ___ weeks} {to document resolution|}.",
        "{Findings|Results} were {discussed with|communicated to} Dr. ___ {by telephone|} at ___.",
        "{Clinical correlation is recommended|Correlate clinically}.",
        "{CT|Chest CT} {is recommended|may be helpful|could be obtained} for further evaluation.",
    ),
}

NORMAL = (
    (
        "{No acute {osseous|bony} abnormality|Osseous structures are {intact|unremarkable}}.",
        "{The bony thorax is {intact|unremarkable}|Imaged osseous structures are intact}.",
        "No {displaced|acute} {rib|} fracture {is seen|}.",
    ),
    (
        "The {hilar|mediastinal and hilar} contours are {normal|unremarkable|within normal limits}.",
        "{Mediastinal contours are unremarkable|The hila are {normal|unremarkable}}.",
    ),
    (
        "{The upper abdomen is unremarkable|No free air below the diaphragm}.",
        "{No free {air|intraperitoneal air} {is seen|} {below|beneath} the {right hemidiaphragm|"
        "diaphragm}}.",
    ),
)
