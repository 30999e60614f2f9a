"""The tables of a study: what they say of cells, and that they depend on the cells alone."""

import csv
import itertools
import json

import numpy as np
import pytest
from scipy import stats

from medsyn_jax.core.errors import UserError
from medsyn_jax.tables import cells, report
from medsyn_jax.tables.cells import Cell

ARMS = ("real", "synthetic", "mixed", "duplicated")
CELLS = [
    Cell("convirt", arm, task, fraction, seed)
    for seed, arm, task, fraction in itertools.product(
        range(3), ARMS, ("classify", "segment"), (0.01, 1.0)
    )
]


def value_of(cell: Cell) -> float:
    """The arm's value, the same noise for all arms of a seed, and a little noise of its own."""
    noise = np.random.default_rng([cell.seed, int(100 * cell.fraction)]).normal()
    own = np.random.default_rng([cell.seed, ARMS.index(cell.arm), 9]).normal()
    start = {"real": 0.8, "synthetic": 0.7, "mixed": 0.8, "duplicated": 0.8}[cell.arm]
    return start + 0.05 * noise + 0.002 * own


def write_cell(folder, cell: Cell, value, metric="auroc/mean"):
    folder.mkdir(exist_ok=True)
    place = {"method": cell.method, "arm": cell.arm, "task": cell.task}
    entry = {"cell": place | {"fraction": cell.fraction, "seed": cell.seed}, "metric": metric}
    entry["metrics"] = {metric: {"value": value, "n": 500, "ci95": [value - 0.1, value + 0.1]}}
    (folder / f"{cell.name}.json").write_text(json.dumps(entry))


@pytest.fixture
def folder(tmp_path):
    for cell in CELLS:
        write_cell(tmp_path / "cells", cell, value_of(cell))
    return tmp_path / "cells"


def tables(workdir, folder):
    results = report.write(workdir, cells.read(folder, CELLS), ("classify", "segment"), len(CELLS))
    names = ("table.md", "table.tex", "table.csv", "report.html")
    return results, {name: (workdir / name).read_bytes() for name in names}


def test_values_and_their_intervals_are_those_over_the_seeds(tmp_path, folder):
    results, files = tables(tmp_path, folder)
    values = [value_of(Cell("convirt", "mixed", "segment", 0.01, seed)) for seed in range(3)]
    entry = results["segment/convirt/mixed/1%"]
    interval = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert entry["value"] == pytest.approx(np.mean(values), abs=1e-12)
    np.testing.assert_allclose(entry["ci95"], interval, rtol=1e-9)
    assert entry["n"] == 3
    shown = f"{np.mean(values):.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
    assert f"| convirt, mixed | {shown} |" in files["table.md"].decode()


def test_differences_are_of_the_same_seeds_and_ties_are_marked(tmp_path, folder):
    _, files = tables(tmp_path, folder)
    text = files["table.md"].decode()
    gaps = [
        value_of(Cell("convirt", "synthetic", "classify", 1.0, seed))
        - value_of(Cell("convirt", "real", "classify", 1.0, seed))
        for seed in range(3)
    ]
    low, high = stats.t.interval(0.95, 2, np.mean(gaps), stats.sem(gaps))
    assert high < 0  # although the values of the two arms overlap
    line = next(s for s in text.splitlines() if s.startswith("| convirt: synthetic minus real |"))
    assert line.endswith(f"| {np.mean(gaps):+.3f} [{low:+.3f}, {high:+.3f}] |")
    tied = next(s for s in text.splitlines() if s.startswith("| convirt: mixed minus duplicated |"))
    assert tied.count(" = |") == 2


def test_the_tables_are_a_function_of_the_cells_alone(tmp_path, folder):
    _, first = tables(tmp_path, folder)
    again = tmp_path / "again"
    for cell in reversed(CELLS):  # written in another order
        write_cell(tmp_path / "other", cell, value_of(cell))
    again.mkdir()
    assert tables(again, tmp_path / "other")[1] == first


def test_the_csv_has_a_line_for_each_cell(tmp_path, folder):
    _, files = tables(tmp_path, folder)
    rows = list(csv.DictReader(files["table.csv"].decode().splitlines()))
    assert len(rows) == len(CELLS)
    assert float(rows[0]["value"]) == value_of(CELLS[0])
    assert float(rows[0]["high"]) == value_of(CELLS[0]) + 0.1
    assert rows[0]["arm"] == "real"


def test_an_unfinished_study_says_so(tmp_path):
    for cell in CELLS[:5]:
        write_cell(tmp_path / "cells", cell, value_of(cell))
    _, files = tables(tmp_path, tmp_path / "cells")
    for name in ("table.md", "table.tex", "report.html"):
        assert f"5 of {len(CELLS)} cells are finished." in files[name].decode()


def test_one_seed_has_no_interval_and_an_undefined_value_no_part(tmp_path):
    write_cell(tmp_path / "cells", CELLS[0], 0.5)
    undefined = Cell("convirt", "real", "classify", 0.01, 1)
    write_cell(tmp_path / "cells", undefined, 0.5)
    path = tmp_path / "cells" / f"{undefined.name}.json"
    entry = json.loads(path.read_text())
    entry["metrics"]["auroc/mean"] = {"value": None, "n": 0}
    path.write_text(json.dumps(entry))
    results, files = tables(tmp_path, tmp_path / "cells")
    assert results == {"classify/convirt/real/1%": {"value": 0.5, "n": 1}}
    assert "| convirt, real | 0.500 |" in files["table.md"].decode()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"cell": {}, "metric": "x", "metrics": {}}'])
def test_a_file_that_is_no_cell_is_one_line(tmp_path, folder, text):
    path = folder / f"{CELLS[3].name}.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path.name}: is no finished cell .*delete the file"):
        tables(tmp_path, folder)


def test_a_renamed_cell_is_refused(tmp_path, folder):
    (folder / f"{CELLS[0].name}.json").replace(folder / f"{CELLS[1].name}.json")
    with pytest.raises(UserError, match="is no finished cell of this study"):
        tables(tmp_path, folder)


def test_a_task_without_a_defined_value_has_an_empty_plot(tmp_path):
    write_cell(tmp_path / "cells", CELLS[0], 0.5)
    path = tmp_path / "cells" / f"{CELLS[0].name}.json"
    path.write_text(path.read_text().replace('"value": 0.5', '"value": null'))
    results, files = tables(tmp_path, tmp_path / "cells")
    assert results == {}
    assert "| convirt, real | - |" in files["table.md"].decode()


def test_a_table_before_any_result_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no cell is finished"):
        tables(tmp_path, tmp_path / "none")
