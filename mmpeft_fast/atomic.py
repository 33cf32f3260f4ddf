"""Writes that are seen whole or not at all: a temporary neighbour, flushed to disk, then one rename.

A folder that exists is replaced by exchanging two names (Linux's renameat2). Where the file system cannot do that, the
old folder stands aside as `.NAME.old` for the moment between two renames; `recover` puts it back after a crash there.

A temporary `.NAME.XXXXXXXX` is locked (flock) while its process lives: what a killed one leaves is told by its lock
being free, and goes with the next write of that name, or with `clear_leftovers`.
"""

import ctypes
import errno
import functools
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# What a kernel, a file system or a sandbox without RENAME_EXCHANGE answers.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}

_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}", re.DOTALL)  # of mkstemp and mkdtemp
_LOCK = ".lock"
_held: set[int] = set()  # handles of locked files
_ASIDE = re.compile(r"\.(.+)\.old", re.DOTALL)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a UTF-8 text file. The folder must exist."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by a file. The folder must exist."""
    _clear(path.parent, path.name)
    handle, name = _locked(lambda: tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(handle, 0o644)  # mkstemp makes it private to the user
            os.fsync(handle)
            os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    _flush(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end, or vanishes if the block raises.

    Whenever the process dies, `recover(path)` finds the old folder or the new one. Raises NotADirectoryError where
    `path` is a file.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder to replace", str(path))
    _clear(path.parent, path.name)
    with _temporary_folder(path) as temporary:
        try:
            yield temporary
            temporary.chmod(0o755)  # mkdtemp makes it private to the user
            for folder, _, files in os.walk(temporary):
                for file in files:
                    _flush(os.path.join(folder, file))
                _flush(folder)
            _put(temporary, path)
        except BaseException:
            with suppress(OSError):
                recover(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Delete a folder; whenever the process dies it is whole, or a leftover."""
    with _temporary_folder(path.resolve()) as temporary:
        os.rename(path, temporary)  # over the empty folder
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(folder: Path, names: str) -> None:
    """Remove what killed writers of this module have left in `folder`, of files and folders whose whole name matches
    the expression `names`; what stands aside comes back first. Nothing of a process that lives is touched."""
    for entry in sorted(folder.iterdir()):
        aside = _ASIDE.fullmatch(entry.name)
        if aside and re.fullmatch(names, aside[1]):
            path = folder / aside[1]
            recover(path)
            shutil.rmtree(_aside(path), ignore_errors=True)
    _clear(folder, names, is_expression=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an existing folder against other processes: a lock on a file `.lock` in it, which the system frees when the
    process ends however it does.

    Raises ValueError where another process holds it.
    """
    while True:
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, wait=False)
        except BlockingIOError as error:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"{folder}: expected no other run at work in it, process {holder or 'unknown'} is"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error}); take care that no other run writes there", stacklevel=3
            )
        if _is_file_of(handle, folder / _LOCK):
            break
        os.close(handle)  # its last holder has removed it in between
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    _held.add(handle)
    try:
        yield
    finally:
        _held.discard(handle)
        with suppress(OSError):
            os.unlink(folder / _LOCK)
        os.close(handle)


def _close_held() -> None:
    """A forked child, such as a loader's worker, may outlive its parent for a while: it must not go on locking."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


def recover(path: Path) -> Path:
    """Put a folder back that a crash left standing aside; call it before reading what `new_folder` wrote, but not while
    another process writes.

    Returns:
        `path`.
    """
    aside = _aside(path)
    if not path.exists() and aside.exists():
        os.rename(aside, path)
    return path


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """An empty, locked folder beside `path`."""

    def make() -> tuple[int, str]:
        name = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
        return os.open(name, os.O_RDONLY), name

    handle, name = _locked(make)
    try:
        yield Path(name)
    finally:
        os.close(handle)


def _locked(make: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """What `make` returns, a handle and its file's name, once it is locked and still there."""
    while True:
        handle, name = make()
        with suppress(OSError):  # of a file system without locks, where nothing counts as left over
            _lock(handle, wait=True)
        if _is_file_of(handle, name):  # nobody took it for a leftover before it was locked
            return handle, name
        os.close(handle)


def _is_file_of(handle: int, path: str | Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _clear(folder: Path, names: str, *, is_expression: bool = False) -> None:
    """Remove temporaries of these names whose process is gone."""
    with suppress(OSError):
        for entry in os.listdir(folder):
            found = _TEMPORARY.fullmatch(entry)
            if found and (re.fullmatch(names, found[1]) if is_expression else names == found[1]):
                _remove_if_unlocked(folder / entry)


def _remove_if_unlocked(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        _lock(handle, wait=False)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    except OSError:  # its process lives, or the file system has no locks to tell
        pass
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool) -> None:
    """Raises OSError where the file is locked, or cannot be."""
    try:
        import fcntl  # POSIX only, so not at the top
    except ImportError as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _put(temporary: Path, path: Path) -> None:
    """Give `temporary` the name `path` and drop what had it before."""
    recover(path)
    if not path.exists():
        os.rename(temporary, path)
        old = _aside(path)
    elif _exchange(temporary, path):
        old = temporary
    else:
        old = _aside(path)
        shutil.rmtree(old, ignore_errors=True)  # of a crash after the new folder was in place
        os.rename(path, old)
        os.rename(temporary, path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path) -> Path:
    path = path.resolve()
    return path.with_name(f".{path.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    renameat2 = _renameat2()
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The C library's renameat2, or None where it has none (not Linux, musl before 1.2.6, glibc before 2.28)."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _flush(path: str | os.PathLike) -> None:
    """Force a file or a folder's list of names to disk, so that a power cut cannot reorder contents and renames."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
