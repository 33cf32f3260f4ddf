"""What a frozen vision tower makes of images, on disk: one memory-mapped safetensors file an image.

Files are written whole or not at all and never changed, so that any number of processes may share a folder, and any of
them may be killed. Beyond a limit the files that were read longest ago go.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mmpeft_fast.atomic import clear_leftovers, write_bytes
from mmpeft_fast.fields import at_least, check_value

DEFAULT_MOST_BYTES = 100 << 30
_SUFFIX = ".safetensors"
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
# Of the limit: what a process writes between two looks at what the folder holds, and what is left by clearing it.
_UNSEEN, _KEPT = 1 / 32, 7 / 8


class FeatureStore:
    """Tensors by key in a folder.

    folder: is made where it is missing. revision: of what made the tensors; part of every key. most_bytes: of all files
    together; as many processes as write at once may be over it by a thirty-second each.

    Raises:
        ValueError: the folder cannot be one that is written to, or the limit is no positive integer.
    """

    def __init__(self, folder: str | Path, revision: str, *, most_bytes: int = DEFAULT_MOST_BYTES) -> None:
        check_value("most_bytes", most_bytes, Annotated[int, at_least(1)])
        self.folder, self.revision, self.most_bytes = Path(folder), revision, most_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: expected a folder for vision features, but {error.strerror}") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ValueError(f"{folder}: expected a folder for vision features that may be written to")
        clear_leftovers(self.folder, _NAME.pattern)
        self._unseen = most_bytes  # bytes written since the last look; looks at the first write

    def key(self, *parts: str) -> str:
        """Of what was made from these parts by the store's revision."""
        return hashlib.sha256("\n".join((self.revision, *parts)).encode()).hexdigest()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors, which lie in the file until they are used; None where there are none."""
        path = self._path(key)
        try:
            tensors = load_file(path)
            os.utime(path)
        except (FileNotFoundError, RuntimeError):
            # Never written, or cleared by another process meanwhile. safetensors opens a file once for its header and
            # once to map it; where it is gone by then, that is a RuntimeError.
            return None
        except SafetensorError:  # damaged from outside
            with suppress(OSError):
                path.unlink()
            return None
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, which are copied. Raises OSError where that fails; what is there stays whole."""
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        write_bytes(self._path(key), content)
        self._unseen += len(content)
        if self._unseen > self.most_bytes * _UNSEEN:
            self._clear()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _clear(self) -> None:
        """Remove the files that were read longest ago where all are more than the limit."""
        self._unseen = 0
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if _NAME.fullmatch(entry.name):
                        stat = entry.stat()
                        files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        if total <= self.most_bytes:
            return
        for _, size, path in sorted(files):
            if total <= self.most_bytes * _KEPT:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
