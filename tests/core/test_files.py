import pytest

from medsyn_jax.core import files


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
