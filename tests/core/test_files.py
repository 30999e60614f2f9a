import errno

import pytest

from medsyn_jax.core import files
from medsyn_jax.core.errors import UserError


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "table.txt"
    with files.replaced(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()

    def stopped():
        with files.replaced(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert path.read_text() == "old"
    with files.replaced(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [(p.name, p.read_text()) for p in path.parent.iterdir()] == [("table.txt", "new")]


def test_a_new_folder_appears_whole_and_replaces_nothing(tmp_path):
    path = tmp_path / "new" / "folder"

    def write(fails=False):
        with files.new_folder(path) as temporary:
            (temporary / "table.txt").write_text("whole")
            assert not path.exists() or not [*path.iterdir()]
            if fails:
                raise KeyError

    with pytest.raises(KeyError):
        write(fails=True)
    assert not [*path.parent.iterdir()]
    path.mkdir()  # an empty folder holds nothing that could be lost
    write()
    assert (path / "table.txt").read_text() == "whole"
    with pytest.raises(UserError, match="folder: is there already and is not overwritten"):
        write()
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("write failed: No space left on device"),  # as array_record has it
        ValueError("open() [os_error_code='28']"),  # as TensorStore has it
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, error):
    path = tmp_path / "table.txt"
    with (
        pytest.raises(UserError, match=f"^disk full: {path}: free some space"),
        files.replaced(path),
    ):
        raise error
    with pytest.raises(RuntimeError, match="another"), files.replaced(path):
        raise RuntimeError("another")
