"""Ingestion: radiographs and reports from a source to a directory of shards (<workdir>/shards).

demo: the embedded phantom corpus.
smoke: a few of its records.
pairs: a CSV with an image and a report column, or with columns of findings and impression:
  --config.ingest.path=pairs.csv --config.ingest.pairs.image=path --config.ingest.pairs.report=text
folder: class folders, <path>/[train|valid|test/]<class>/*.jpg: --config.ingest.path=DIR
paper: MIMIC-CXR-JPG 2.0.0 at 256 pixels: --config.ingest.path=DIR holds the `files` folder and the
  csv.gz tables; --config.ingest.mimic_cxr.reports=DIR if the reports are elsewhere.
chexpert, siim, medmnist, ...: a public set of PUBLIC at 256 pixels; coco, masks: your own
  annotations: --config.ingest.path=DIR. With --config.ingest.splits=FILE_OR_DIR, a published split
  list is followed.
Train on the result: --config configs/convirt.py --config.data.sources="('<workdir>/shards',)"
"""

from ml_collections import ConfigDict

from configs import common

PUBLIC = {  # variant: what config.ingest.path holds
    "chexpert": "CheXpert 1.0, small or full: train.csv, valid.csv, and test.csv if there",
    "chexpert_plus": "CheXpert Plus: df_chexpert_plus_240401.csv, chexbert_labels, and the images",
    "rsna": "RSNA Pneumonia (Kaggle, stage 2): two stage_2 tables and stage_2_train_images",
    "siim": "SIIM-ACR Pneumothorax (Kaggle): train-rle.csv and dicom-images-train",
    "openi": "Open-i's chest X-rays (Kaggle): two indiana tables and images_normalized",
    "medmnist": "one .npz file of MedMNIST",
    "coco": "JSON files of COCO's object detection, and images",
    "masks": "images/ and masks/ with files of equal names, perhaps boxes.csv",
    "covidx": "COVIDx: the lists train*.txt and test*.txt, and folders of these names",
    "object_cxr": "Object-CXR: train.csv, dev.csv, test.csv if there, and folders of these names",
    "nih": "ChestX-ray14: Data_Entry_2017*.csv, train_val_list.txt, test_list.txt, and the images",
    "vindr": "VinDr-CXR of PhysioNet (annotations, train, test) or of Kaggle (train.csv, train)",
}
SETTINGS = {  # of sets; `list_items` of each source says what they mean
    "covidx": {"version": ""},
    "nih": {"boxes": False},
    "coco": {"subject": ""},
    "masks": {"subject": ""},
    "vindr": {"iou": 0.5, "readers": 2},
}
VARIANTS = (*common.VARIANTS, "pairs", "folder", *PUBLIC)


def get_config(variant: str = "demo") -> ConfigDict:
    common.check(variant, VARIANTS)
    config = ConfigDict({"task": "ingest"})
    config.ingest = common.phantom(size=64, subjects=2500)
    if variant == "smoke":
        config.ingest = common.phantom(size=32, subjects=20)
        config.ingest.update({"records_per_shard": 16, "workers": 1})
    if variant == "paper":
        config.ingest.update({"source": "mimic_cxr", "path": "data/mimic-cxr-jpg", "size": 256})
    if variant in ("pairs", "folder", *PUBLIC):
        config.ingest.update({"source": variant, "size": 256})
    if variant in SETTINGS:
        config.ingest[variant] = SETTINGS[variant]
    config.ingest.mimic_cxr = {"reports": ""}
    config.ingest.folder = {"subject": ""}
    return config
