"""Captions of contact sheets, in pixels."""

import pytest
from PIL import ImageFont

from medsyn_jax.data.store import card

FONT = ImageFont.load_default(11)
TEXTS = {
    "letters of every width": "illi WWWW MODERATE CARDIOMEGALY " * 20,
    "one long word": "Pneumonoultramicroscopicsilicovolcanoconiosis" * 20,
    "wide": "W" * 500,
    "unicode": "Überblähung 胸部X線写真 " * 20,
    "short": "No acute disease.",
    "empty": "",
    "spaces": " \n\t ",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("width", [5, 60, 192])
def test_no_line_is_wider_than_its_image(text, width):
    lines = card.wrapped(text, FONT, width, 6).split("\n")
    assert len(lines) <= 6
    letter = max(FONT.getlength(c) for c in f"{text}M")  # no line can hold less than one
    assert all(FONT.getlength(line) <= max(width, letter) for line in lines[:-1])
    assert FONT.getlength(lines[-1]) <= max(width, FONT.getlength(" ...") + letter)
    shown, whole = "".join(lines).replace(" ", ""), "".join(text.split())
    assert shown == whole or (shown.endswith("...") and whole.startswith(shown[:-3]))


def test_as_many_words_as_fit_stand_in_a_line():
    width = FONT.getlength("No acute")
    assert card.wrapped("No acute disease.", FONT, width, 2) == "No acute\ndisease."
    assert card.wrapped("No acute", FONT, width, 1) == "No acute"
    assert card.wrapped("No acute disease.", FONT, width, 1) == "No ..."
