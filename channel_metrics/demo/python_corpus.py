"""Real text that every machine with Python has, as records `{"text": ...}`.

    >>> next(read_corpus("topics", max_bytes=1000))["metadata"]["name"]
    'assert'

Names are sorted, so all runs on one machine read the same records.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from channel_metrics.errors import ChannelMetricsError, ConfigError

__all__ = ["PARTS", "read_corpus"]

_CHUNK_BYTES = 1200
_NOT_LIBRARY = ("test", "idlelib", "site-packages", "dist-packages")
_TEXT_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS", "METADATA")


def read_corpus(part: str, *, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Records of about 1 kB of one of `PARTS`, until `max_bytes` are read.

    One document gives at most an eighth of `max_bytes`.

    Raises:
        ConfigError: for an unknown part.
        ChannelMetricsError: if this Python has no such text.
    """
    if part not in PARTS:
        raise ConfigError(f"unknown part {part!r} of python_corpus; known are {', '.join(PARTS)}.")
    left = max_bytes
    for name, text in PARTS[part]():
        for chunk in _chunks(text, limit=max(_CHUNK_BYTES, max_bytes // 8)):
            left -= len(chunk.encode())
            if left < 0:
                return
            yield {"text": chunk, "metadata": {"name": name}}
    if left == max_bytes:
        raise ChannelMetricsError(
            f"expected text for python_corpus part {part!r}, but this Python "
            f"({sysconfig.get_path('stdlib')}) has none; use another part, or install it."
        )


def _standard_library() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    nested = (path for path in root.glob("*/*.py") if path.parent.name not in _NOT_LIBRARY)
    yield from _files(sorted(root.glob("*.py")) + sorted(nested), root)


def _standard_library_tests() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    tests = sorted(root.glob("test/test_*.py"))
    # Some distributions lack `test`. The unit tests of installed packages are similar text.
    packages = Path(sysconfig.get_path("purelib"))
    yield from _files(tests, root)
    if not tests:
        yield from _files(sorted(packages.glob("*/**/test_*.py")), packages)


def _topics() -> Iterator[tuple[str, str]]:
    # Some distributions have the documentation in another package.
    with contextlib.suppress(ModuleNotFoundError):
        topics = importlib.import_module("pydoc_data.topics").topics
        yield from sorted(topics.items())


def _packaged_texts() -> Iterator[tuple[str, str]]:
    """Licences and descriptions of the installed packages; equal texts count once."""
    seen: set[str] = set()
    folders = {
        Path(str(distribution.locate_file("")))
        for distribution in importlib.metadata.distributions()
    }
    files = itertools.chain.from_iterable(
        folder.glob(f"*.dist-info/{depth}{name}*")
        for folder in folders
        for depth in ("", "licenses/")
        for name in _TEXT_NAMES
    )
    licence = sorted(Path(sysconfig.get_path("stdlib")).glob("LICENSE*"))
    for path in [*licence, *sorted(set(files), key=lambda path: (path.parts[-2:], path))]:
        for name, text in _files([path], path.parent.parent):
            if text not in seen:
                seen.add(text)
                yield name, text


PARTS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "stdlib": _standard_library,
    "tests": _standard_library_tests,
    "topics": _topics,
    "packages": _packaged_texts,
}


def _files(paths: list[Path], root: Path) -> Iterator[tuple[str, str]]:
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # Tests of the standard library have other encodings on purpose.
        if text.strip():
            yield path.relative_to(root).as_posix(), text


def _chunks(text: str, *, limit: int) -> Iterator[str]:
    """`text` in pieces of whole lines of about `_CHUNK_BYTES`, `limit` bytes in all."""
    lines: list[str] = []
    held = read = 0
    for line in text.splitlines(keepends=True):
        held += len(line.encode())
        lines.append(line)
        if held >= _CHUNK_BYTES:
            yield "".join(lines)
            read += held
            lines, held = [], 0
            if read >= limit:
                return
    if "".join(lines).strip():
        yield "".join(lines)
