"""Opens log files: plain, gzip or zstd, UTF-8 or UTF-16 (as PowerShell writes it).

The bytes that a reader gets are always UTF-8 text, whatever is on the disk.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from channel_metrics.analysis.readers.readings import Problems, Progress
from channel_metrics.extras import need

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["ends_of", "is_plain", "is_regular", "open_log"]

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_CHUNK = 1 << 16
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


def is_regular(path: Path) -> bool:
    """Whether this is a file with contents: no folder, no pipe, no link that leads nowhere."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def is_plain(path: Path) -> bool:
    """Whether the bytes of a file are its text, so that one can read on from a place in it."""
    with path.open("rb") as file:
        return not file.read(4).startswith((_GZIP, _ZSTD, *_UTF16))


@contextmanager
def open_log(path: Path, problems: Problems, progress: Progress) -> Iterator[BinaryIO]:
    """Open a log as UTF-8 bytes.

    Args:
        path: a regular file.
        problems: a compressed file that is cut off is counted here; what comes before is read.
        progress: is called with the number of bytes that were read from the disk.
    """
    with path.open("rb") as raw:
        counted = io.BufferedReader(_Counted(raw, progress), _CHUNK)
        yield _decoded(_unpacked(counted, path, problems))


def ends_of(suffix: str) -> tuple[str, ...]:
    """How the names of files with this suffix may end, compressed or not."""
    return (suffix, f"{suffix}.gz", f"{suffix}.zst")


def _unpacked(file: Any, path: Path, problems: Problems) -> Any:
    head = file.peek(4)[:4]
    if head.startswith(_GZIP):
        read = gzip.GzipFile(fileobj=file).read1
    elif head == _ZSTD:
        zstd = need("zstandard", extra="report")
        read = zstd.ZstdDecompressor().stream_reader(file, read_across_frames=True).read1
    else:
        return file
    return io.BufferedReader(_Unpacked(read, path, problems), _CHUNK)


def _decoded(file: Any) -> Any:
    if file.peek(2)[:2] in _UTF16:
        return io.BufferedReader(_Recoded(file), _CHUNK)
    return file


class _Stream(io.RawIOBase, ABC):
    """A file whose bytes come from `take`."""

    @abstractmethod
    def take(self, count: int) -> bytes:
        """The next bytes, at most `count`; none at the end."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        part = self.take(len(view))
        view[: len(part)] = part
        return len(part)


class _Counted(_Stream):
    """Reports what is read from a file."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file, self._progress = file, progress

    def take(self, count: int) -> bytes:
        part = self._file.read(count)
        self._progress(len(part))
        return part


class _Unpacked(_Stream):
    """The contents of a compressed file, up to the place where it is damaged."""

    def __init__(self, read: Callable[[int], bytes], path: Path, problems: Problems) -> None:
        self._read, self._path, self._problems = read, path, problems
        self._is_damaged = False

    def take(self, count: int) -> bytes:
        if self._is_damaged:
            return b""
        try:
            return self._read(count)
        except Exception as error:  # zstd may not be installed, so its error has no name here
            if not isinstance(error, _DAMAGE) and type(error).__name__ != "ZstdError":
                raise
            self._is_damaged = True
            self._problems.add(self._path, None, f"the compressed file is damaged ({error})")
            return b""


class _Recoded(_Stream):
    """UTF-16 as UTF-8."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-16")("replace")
        self._waiting = b""

    def take(self, count: int) -> bytes:
        while not self._waiting:
            chunk = self._file.read(_CHUNK)
            self._waiting = self._decoder.decode(chunk, final=not chunk).encode("utf-8", "replace")
            if not chunk:
                break
        part, self._waiting = self._waiting[:count], self._waiting[count:]
        return part
