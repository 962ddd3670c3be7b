"""What a format of logs is, and the folder in which its files are looked for.

A reader's module defines one `Format`, and `sources.FORMATS` names them all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch, translate
from importlib.util import find_spec
from pathlib import Path

from channel_metrics.analysis.readers.files import ends_of, is_regular
from channel_metrics.analysis.readers.readings import Reader

__all__ = ["MAX_FILES", "OUTPUT_FOLDER", "Files", "Folder", "Format", "in_folder", "natural"]

# The default folder of results. It is not read as a run.
OUTPUT_FOLDER = "channel_analysis"
_SKIPPED = {OUTPUT_FOLDER, ".git", "node_modules", "__pycache__", ".venv"}
_MAX_ENTRIES = 500_000
# Of a folder, so many files of a kind are opened.
MAX_FILES = 200
_LOGS = (".log", ".txt", ".out", ".err", ".jsonl", ".json", ".csv", ".wandb")

# The files of one start of a job, in the order in which they were written.
Files = tuple[Path, ...]


class Folder:
    """The files below a folder. It is searched once.

    Attributes:
        root: the folder.
        notes: what was left aside.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []
        # Strings, because a folder may have very many files.
        self._names = list(self._walk())

    def note(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def named(self, *patterns: str, depth: int = 99, limit: int | None = None) -> list[Path]:
        """Files with such a name, compressed or not, in order.

        Args:
            patterns: names may match any of these.
            depth: a file is at most so many folders down.
            limit: only the newest so many files; a note counts the others.
        """
        ends = [translate(end) for pattern in patterns for end in ends_of(pattern)]
        is_wanted = re.compile("|".join(ends)).match
        names = [os.path.join(folder, name) for folder, name in self._names if is_wanted(name)]
        if limit is not None and len(names) > limit:
            self.note(f"{len(names) - limit:,} older files ({patterns[0]}) were not looked at")
            names = sorted(names, key=os.path.getmtime)[-limit:]
        found = map(Path, names)
        top = len(self.root.parts) + depth
        return sorted((path for path in found if len(path.parts) <= top), key=natural)

    def _walk(self) -> Iterator[tuple[str, str]]:
        """(folder, name) of each file."""
        waiting, count = [os.fspath(self.root)], 0
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        count += 1
                        if entry.is_dir(follow_symlinks=False):
                            if entry.name not in _SKIPPED:
                                waiting.append(entry.path)
                        elif self._is_file(entry):
                            yield folder, entry.name
            except OSError as error:
                self.note(f"{error.filename}: {error.strerror}")
            if count > _MAX_ENTRIES:
                self.note(f"only the first {_MAX_ENTRIES:,} files of {self.root} were looked at")
                return

    def _is_file(self, entry: os.DirEntry[str]) -> bool:
        if not entry.is_symlink() and entry.is_file():
            return True
        path = Path(entry.path)
        is_log = entry.name.endswith(tuple(e for suffix in _LOGS for e in ends_of(suffix)))
        if is_regular(path):
            # A link such as `latest.log` would give the same log a second time.
            return self.root.resolve() not in path.resolve().parents
        if is_log and not path.is_dir():
            self.note(f"{path} was left aside: it is no file, or leads nowhere")
        return False


@dataclass(frozen=True, kw_only=True)
class Format:
    """A kind of log.

    Attributes:
        name: what `--format` takes.
        what: what is read, in a few words.
        read: reads one file.
        check: says what a file lacks to be read; an empty text if nothing.
        suffixes: how the names of such files end, if one is named by itself.
        names: patterns of their names, if the name says more than the end.
        starts: finds the files in a folder, for each start of a job.
        needs: (module, extra) that the reader needs.
        in_order: whether the readings of all keys come in the order of time.
    """

    name: str
    what: str
    read: Reader
    check: Callable[[Path], str] = field(default=lambda path: "")
    suffixes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    starts: Callable[[Folder], list[Files]]
    needs: tuple[str, str] | None = None
    in_order: bool = True

    def may_be(self, path: Path) -> bool:
        """Whether a file could be in this format, going by its name."""
        patterns = [*self.names, *(f"*{suffix}" for suffix in self.suffixes)]
        return any(fnmatch(path.name, end) for pattern in patterns for end in ends_of(pattern))

    @property
    def missing(self) -> str:
        """How to install what is missing; an empty text if nothing."""
        if self.needs is None or find_spec(self.needs[0]):
            return ""
        module, extra = self.needs
        return f"{module!r} is not installed; run: pip install 'channel_metrics[{extra}]'"


def in_folder(
    *patterns: str, check: Callable[[Path], str], depth: int = 99
) -> Callable[[Folder], list[Files]]:
    """Each file with such a name that passes the check is one start of a job."""
    return lambda folder: [
        (path,) for path in folder.named(*patterns, depth=depth, limit=MAX_FILES) if not check(path)
    ]


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Sorts `v2` before `v10`."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]
