"""Whenever a write fails or its process dies, the old content is there or the new one, never a part."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from random import Random

import pytest

from mmpeft_fast import atomic
from mmpeft_fast.atomic import new_folder, recover, write_text

NAMES = [f"part{i}" for i in range(4)]


@pytest.fixture(params=["exchange", "aside"])
def way(request, monkeypatch):
    """Both ways to replace a folder."""
    if request.param == "aside":
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    elif atomic._renameat2() is None:
        pytest.skip("the C library has no renameat2")
    return request.param


def write(folder: Path, content: str) -> None:
    with new_folder(folder) as temporary:
        for name in NAMES:
            (temporary / name).write_text(content)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text(content)


def content_of(folder: Path) -> str:
    """What one `write` has written; fails where it is a part of it or of several."""
    files = [recover(folder) / "inner" / "file", *(folder / name for name in NAMES)]
    (content,) = {file.read_text() for file in files}
    return content


def test_failed_writes_leave_what_was_there(tmp_path, way):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"

    folder = tmp_path / "folder"
    write(folder, "old")
    with pytest.raises(RuntimeError), new_folder(folder) as temporary:
        (temporary / NAMES[0]).write_text("new")
        raise RuntimeError
    assert content_of(folder) == "old"
    write(folder, "new")
    assert content_of(folder) == "new"
    assert sorted(tmp_path.iterdir()) == [path, folder]


def test_links_and_files_in_the_way(tmp_path, way):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and content_of(tmp_path / "real") == "new"
    write_text(tmp_path / "file", "text")
    with pytest.raises(NotADirectoryError, match="expected a folder"):
        write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "text"


def test_the_file_system_may_refuse_to_exchange(tmp_path, monkeypatch):
    def refuse(*_):
        atomic.ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(atomic, "_renameat2", lambda: refuse)
    write(tmp_path / "folder", "old")
    write(tmp_path / "folder", "new")
    assert content_of(tmp_path / "folder") == "new" and [path.name for path in tmp_path.iterdir()] == ["folder"]

    monkeypatch.setattr(atomic.ctypes, "get_errno", lambda: errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(tmp_path / "folder", "newer")
    assert content_of(tmp_path / "folder") == "new"


class Dead(BaseException):
    """Nothing happens any more."""


class Saboteur:
    """Lets the first calls of everything that changes a file system pass; then one fails, or all do from then on."""

    CALLS = ("mkdir", "open", "fsync", "close", "chmod", "rename", "replace", "unlink", "rmdir")

    def __init__(self, monkeypatch, *, survives: bool):
        self.left, self.survives, self.fired = 10**9, survives, False
        monkeypatch.setattr(os, "fsync", lambda handle: None)  # which takes long, and shows only in a power cut
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._guard(getattr(os, name), name))
        exchange = atomic._renameat2()
        if exchange is not None:
            exchange = self._guard(exchange, "renameat2")
            monkeypatch.setattr(atomic, "_renameat2", lambda: exchange)

    def _guard(self, call, name):
        def guarded(*args, **options):
            self.left -= 1
            if self.left == 0 or (self.left < 0 and not self.survives):
                self.fired = True
                if name == "close" and not self.survives:
                    call(*args, **options)  # a dead process keeps no file open
                raise OSError(errno.EIO, name) if self.survives else Dead
            return call(*args, **options)

        return guarded


@pytest.mark.parametrize("survives", [True, False], ids=["one call fails", "the process dies"])
def test_a_failure_at_any_step(tmp_path, way, survives, monkeypatch):
    folder, file = tmp_path / "folder", tmp_path / "file"
    with monkeypatch.context() as patch:
        saboteur = Saboteur(patch, survives=survives)
        seen = []
        for step in range(1, 200):
            saboteur.left = 10**9
            saboteur.fired = False
            write(folder, "old")
            write_text(file, "old")
            saboteur.left = step
            try:
                write(folder, "new")
                write_text(file, "new")
            except (OSError, Dead):
                assert saboteur.fired
                assert folder.exists() or not survives  # without waiting for a reader's `recover`
            saboteur.left = 10**9
            seen.append((content_of(folder), file.read_text()))
            if not saboteur.fired:
                break
        else:
            pytest.fail("expected fewer steps")
    assert len(seen) > 30 and seen[-1] == ("new", "new")
    assert set(seen) == {("old", "old"), ("new", "old"), ("new", "new")}


def test_killed_at_any_moment(tmp_path):
    """A child saves in a loop and is killed; what it leaves is whole, and its next life goes on from there."""
    code = """
        import os, sys
        from pathlib import Path
        os.fsync = lambda handle: None  # more writes while it lives
        sys.path.insert(0, sys.argv[2])
        from tests.test_atomic import content_of, write
        folder = Path(sys.argv[1])
        count = int(content_of(folder))
        print("ready", flush=True)
        while True:
            count += 1
            write(folder, str(count))
    """
    folder, counts = tmp_path / "folder", [0]
    write(folder, "0")
    random = Random(0)
    for _ in range(6):
        command = [sys.executable, "-c", textwrap.dedent(code), str(folder), str(Path(__file__).parents[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(random.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
        counts.append(int(content_of(folder)))
    assert counts == sorted(counts) and counts[-1] > 0


def test_leftovers_of_killed_writers_are_cleared_and_nothing_else(tmp_path):
    """A temporary is left over when its process is gone; one that is being written, and a stranger's file, stay."""
    for name in (".folder.abcd1234", ".other.abcd1234", ".folder.notes", "folder.abcd1234"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("half")
    (tmp_path / ".file.abcd1234").write_text("half")
    with new_folder(tmp_path / "folder"), new_folder(tmp_path / "other"):
        alive = {path.name for path in tmp_path.iterdir() if path.name.startswith((".folder", ".other"))}
        assert ".folder.abcd1234" not in alive and ".other.abcd1234" not in alive and len(alive) == 3
        write_text(tmp_path / "file", "text")
        atomic.clear_leftovers(tmp_path, ".*")
        assert {path.name for path in tmp_path.iterdir()} == {*alive, "folder.abcd1234", "file"}
    names = {"folder", "other", "file", "folder.abcd1234", ".folder.notes"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_stands_aside_comes_back_or_goes(tmp_path):
    for name in ("whole", ".whole.old", ".lost.old", ".strange.old"):
        write(tmp_path / name, name)
    atomic.clear_leftovers(tmp_path, "whole|lost")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "lost", ".strange.old"}
    assert content_of(tmp_path / "whole") == "whole" and content_of(tmp_path / "lost") == ".lost.old"


def test_removing_a_folder_and_dying_in_it(tmp_path, monkeypatch):
    write(tmp_path / "folder", "old")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)  # as if killed before
        atomic.remove_folder(tmp_path / "folder")
    assert [path.name.split(".")[1] for path in tmp_path.iterdir()] == ["folder"]
    atomic.clear_leftovers(tmp_path, "folder")
    assert not list(tmp_path.iterdir())
