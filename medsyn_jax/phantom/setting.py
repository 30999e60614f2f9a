"""The words of the phantom reports around the findings: exam, history, devices, background."""

from __future__ import annotations

EXAMS = {
    "PA": "{CHEST (PA)|CHEST RADIOGRAPH, PA|CHEST, PA UPRIGHT|Frontal chest radiograph, PA}",
    "AP": "{CHEST (PORTABLE AP)|PORTABLE CHEST RADIOGRAPH|CHEST (AP)|CHEST PORT. LINE PLACEMENT}",
}
TECHNIQUES = {
    "PA": "{Upright PA view of the chest|Single PA radiograph|Frontal PA chest radiograph}.",
    "AP": "{Portable AP view of the chest|Single AP radiograph|Bedside AP chest radiograph}.",
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

OPENINGS = {
    "PA": (
        "{PA|Frontal PA|Single PA|Upright PA} view of the chest{| was obtained| is provided}.",
        "{Upright frontal|PA|Single frontal upright} {radiograph|view} of the chest.",
        "{Standing|Upright} PA {radiograph|projection}{| was reviewed}.",
    ),
    "AP": (
        "{Portable|Single portable|Semi-upright portable} AP view of the chest{| was obtained}.",
        "{AP portable|Bedside AP|Supine AP} {radiograph|view} of the chest.",
        "{Bedside|Portable} {radiograph|examination} in AP projection{| was reviewed}.",
    ),
}

# what can be seen beside the findings
BACKGROUND = {
    "low": "{Lung volumes are {low|reduced|diminished}|There are low lung volumes|The inspiratory"
    " effort is {poor|low}}{| with bronchovascular crowding|, accentuating the bronchovascular"
    " markings}.",
    "full": "{The lungs are well expanded|The lungs are well inflated|Lung volumes are normal|"
    "Good inspiratory effort}.",
    "hyperinflated": "{The lungs are hyperinflated|Lungs are hyperexpanded}{| with flattening of"
    " the diaphragms|, {suggesting|compatible with} COPD}.",
    "rotated": "{The patient is {rotated|turned} to the <side>|There is patient rotation to the"
    " <side>|Study is limited by rotation to the <side>|<side>ward patient rotation is noted}.",
    "dark": "The {film|image|radiograph} is {overpenetrated|overexposed|somewhat dark}.",
    "pale": "The {film|image|radiograph} is {underpenetrated|underexposed|somewhat pale}.",
    "aorta": "{The aorta is {tortuous|unfolded|ectatic}|There is a {tortuous|prominent} thoracic"
    " aorta|The aortic knob is {prominent|enlarged}|Unfolding of the thoracic aorta}.",
    "scoliosis": "{There is <grade> <name>scoliosis{| of the thoracic spine}|<grade> thoracic"
    " scoliosis, convex to the <side>|<grade> <name>scoliosis is noted}.",
    "habitus": "{Evaluation is limited by {body habitus|overlying soft tissues}|Large body habitus"
    "{| limits the study}|Overlying soft tissue attenuates the bases}.",
    "arms": "The {patient's arms are|arms are} at the sides.",
}

# what the picture cannot tell: chatter of every report
INCIDENTAL = (
    "{There are|Mild} degenerative changes {of|in} the {thoracic spine|spine|shoulders}.",
    "{Gas|Air} is {seen|noted} in the {stomach|gastric fundus}.",
    "{The bones are diffusely demineralized|Bones appear osteopenic}.",
    "Assessment of the {apices|bases} is {somewhat|slightly} limited by technique.",
    "{A skin fold is noted|Monitoring leads have been removed}.",
)

DEVICES = {
    "ett": "{Endotracheal tube|ET tube|The endotracheal tube} <tip>.",
    "ngt": "{Enteric tube|Nasogastric tube|NG tube|Orogastric tube} {courses below the diaphragm|"
    "{terminates|ends} in the stomach|{extends|passes} into the stomach}.",
    "jugular": "<side> {internal jugular|IJ} {central venous catheter|central line|line}"
    " {tip is|terminates|ends} <tip>.",
    "picc": "<side> {PICC|PICC line|upper extremity PICC} {tip is|terminates|ends} <tip>.",
    "port": "<side> {chest wall port|Port-A-Cath|chest port} {tip is|terminates|ends} <tip>.",
    "pacemaker": "<side>{| chest wall| pectoral} {pacemaker|pacer|pacing device|pacemaker"
    " generator} <tip>.",
    "wires": "{Median sternotomy wires {are intact|are noted|are in place|are aligned}|The patient"
    " is status post median sternotomy|Sternotomy wires {are seen|are present}}.",
    "chest tube": "<side> {chest tube|pleural drain|thoracostomy tube} {is in place|is seen|"
    "projects over the <side> hemithorax}.",
}
_VEINS = (
    "in the {upper|proximal} SVC",
    "in the mid {SVC|superior vena cava}",
    "{at the cavoatrial junction|in the lower SVC|in the distal SVC}",
)
# where the tip lies: high, middle, low
TIPS = {
    "ett": (
        "{tip is {6|7} cm above the carina|terminates high in the trachea}",
        "{tip is {4|5} cm above the carina|is in {standard|satisfactory} position}",
        "{tip is low, {1|2} cm above the carina|terminates near the carina}",
    ),
    "jugular": _VEINS,
    "picc": _VEINS,
    "port": _VEINS,
    "pacemaker": (
        "with {a single lead|one lead}{| in the right ventricle}",
        "with {two leads|leads in the right atrium and right ventricle}",
        "with {dual leads|leads in the right atrium and right ventricle}",
    ),
}

NORMAL = (
    (
        "{No acute {osseous|bony} abnormality|Osseous structures are {intact|unremarkable}}.",
        "{The bony thorax is {intact|unremarkable}|Imaged osseous structures are intact}.",
        "No {displaced|acute|displaced rib} fracture{| is seen}.",
    ),
    (
        "The {hilar|mediastinal and hilar} contours are {normal|unremarkable|not widened}.",
        "{Mediastinal contours are unremarkable|The hila are {normal|unremarkable}}.",
    ),
    (
        "{The upper abdomen is unremarkable|No free air below the diaphragm}.",
        "No free {air|intraperitoneal air} {below|beneath} the {right hemidiaphragm|diaphragm}.",
    ),
)
