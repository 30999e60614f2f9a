"""Ingestion: radiographs and reports from a source to a directory of shards (<workdir>/shards).

demo: the embedded phantom corpus.
smoke: a few of its records.
pairs: a CSV with an image and a report column, or with columns of findings and impression:
  --config.ingest.path=pairs.csv --config.ingest.pairs.image=path --config.ingest.pairs.report=text
folder: class folders, <path>/[train|valid|test/]<class>/*.jpg: --config.ingest.path=DIR
paper: MIMIC-CXR-JPG 2.0.0 at 256 pixels: --config.ingest.path=DIR holds the `files` folder and the
  csv.gz tables; --config.ingest.mimic_cxr.reports=DIR if the reports are elsewhere.
Sets as downloaded, in --config.ingest.path=DIR; the source's docstring names the files:
covidx: COVIDx; with lists of several versions, --config.ingest.covidx.version=9A.
object_cxr: Object-CXR, with boxes and masks.
nih: ChestX-ray14; --config.ingest.nih.boxes=True: the 880 images that have boxes, alone.
vindr: VinDr-CXR of PhysioNet or Kaggle; `iou` and `readers` say how readers' boxes are fused.
Train on the result: --config configs/convirt.py --config.data.sources="('<workdir>/shards',)"
"""

from ml_collections import ConfigDict

from configs import common

SETTINGS = {  # of the sources that have any
    "mimic_cxr": {"reports": ""},
    "folder": {"subject": ""},
    "covidx": {"version": ""},
    "nih": {"boxes": False},
    "vindr": {"iou": 0.5, "readers": 2},
}
DOWNLOADED = ("covidx", "object_cxr", "nih", "vindr")
VARIANTS = (*common.VARIANTS, "pairs", "folder", *DOWNLOADED)


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "ingest"})
    config.ingest = common.phantom(size=64, subjects=2500)
    if variant == "smoke":
        config.ingest = common.phantom(size=32, subjects=20)
        config.ingest.update({"records_per_shard": 16, "workers": 1})
    if variant == "paper":
        config.ingest.update({"source": "mimic_cxr", "path": "data/mimic-cxr-jpg", "size": 256})
    if variant in ("pairs", "folder", *DOWNLOADED):
        config.ingest.update({"source": variant, "size": 256})
    config.ingest.update(SETTINGS)
    return config
