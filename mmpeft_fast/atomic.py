"""Writes that are seen whole or not at all: a temporary neighbour, flushed to disk, then one rename.

A folder that exists is replaced by exchanging two names (Linux's renameat2). Where the file system cannot do that, the
old folder stands aside as `.NAME.old` for the moment between two renames; `recover` puts it back after a crash there.
"""

import ctypes
import errno
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# What a kernel, a file system or a sandbox without RENAME_EXCHANGE answers.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a UTF-8 text file. The folder must exist."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp makes it private to the user
        _flush(name)
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
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
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
