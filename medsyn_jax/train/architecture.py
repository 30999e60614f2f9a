"""The sections `image`, `text` and `heads` of a config, which describe the two towers."""

from typing import Any, get_args

from medsyn_jax.core.config import check_choice, check_numbers
from medsyn_jax.core.errors import UserError
from medsyn_jax.models import heads, resnet, towers


def check(config: Any) -> None:
    """Raise UserError if these sections describe no `towers.PairEncoder`."""
    image, text, head = config["image"], config["text"], config["heads"]
    check_choice("image.kind", image["kind"], towers.IMAGE_ENCODERS)
    sizes = ["image.width", "text.width", "text.heads", "text.max_length", "text.summed"]
    sizes += ["heads.width"] if head["kind"] == "linear" else ["heads.width", "heads.hidden"]
    sizes += ["image.heads", "image.layers", "image.patch"] if image["kind"] == "vit" else []
    check_numbers({"image": image, "text": text, "heads": head}, above_0=sizes)
    check_choice("text.pooling", text["pooling"], towers.POOLINGS)
    check_choice("heads.kind", head["kind"], heads.HEADS)
    if image["kind"] == "resnet":
        check_choice("image.block", image["block"], get_args(resnet.Block))
        check_choice("image.stem", image["stem"], get_args(resnet.Stem))
        if len(image["depths"]) != 4 or min(image["depths"]) < 1:
            raise UserError(
                f"config.image.depths: {image['depths']}: give the number of blocks of each of "
                "the four stages, such as (3, 4, 6, 3)"
            )
    elif image["size"] % image["patch"]:
        raise UserError(
            f"config.image.patch: {image['patch']} does not divide config.image.size "
            f"{image['size']}: change one of the two"
        )
    for name in ("text", "image") if image["kind"] == "vit" else ("text",):
        width, count = config[name]["width"], config[name]["heads"]
        if width % count:
            raise UserError(
                f"config.{name}.heads: {count} do not divide config.{name}.width {width}: "
                "change one of the two"
            )
    if text["summed"] > text["layers"]:
        raise UserError(
            f"config.text.summed: {text['summed']} of config.text.layers {text['layers']}: "
            "give at most the number of layers"
        )
    if not head["text"] and text["width"] != head["width"]:
        raise UserError(
            f"config.heads.text: without a head for the text config.heads.width {head['width']} "
            f"must be config.text.width {text['width']}"
        )
    if head["prototypes"] < 0 or head["prototypes"] == 1:
        count = head["prototypes"]
        raise UserError(f"config.heads.prototypes: {count}: give 2 or more, or 0 for none")
