import pytest

from mmpeft_fast.data.atomic import new_folder, write_text


def test_failed_writes_leave_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"

    folder = tmp_path / "folder"
    with new_folder(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), new_folder(folder) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError
    assert (folder / "a").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [path, folder]
