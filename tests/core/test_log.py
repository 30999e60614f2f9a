import re

from medsyn_jax.core import log


def test_the_console_shows_names_as_they_are(capsys):
    log.say("runs/run[ct]/[/bold] :pill: [link")
    assert capsys.readouterr().err == "runs/run[ct]/[/bold] :pill: [link\n"
    with log.ImagesBar("[/x] {y} :pill:", 2, 0, every_s=-1.0) as bar:
        bar.show(1)
    assert capsys.readouterr().err.startswith("[/x] {y} :pill:: 1/2 images")


def test_a_table_is_aligned(capsys):
    log.table(["label", "n", "value"], [["a", "10", "0.5"], ["longer one", "3", "-"]])
    assert capsys.readouterr().out.splitlines() == [
        "label        n  value",
        "a           10    0.5",
        "longer one   3      -",
    ]


def test_the_cost_is_that_of_this_process(capsys):
    log.say_cost("done")
    said = capsys.readouterr().err
    assert re.fullmatch(r"done after [\d.]+ s; peak host memory \d+ MiB \(this process\)\n", said)
