"""Where things are, for tests and for the processes that they start."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PATCHES = ROOT / "patches"
# Helper modules of the tests go by their bare names; pyproject.toml lists the same folders.
FOLDERS = (
    "axolotl",
    "hf",
    "lightning",
    "llamafactory",
    "loop",
    "trl",
    "swift",
    "swift_megatron",
    "megatron",
)
IMPORTS = (ROOT, TESTS, *(TESTS / "trainers" / name for name in FOLDERS))


def python_path(*first: Path | str) -> str:
    """A PYTHONPATH: `first`, then these folders, then what this process was given."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, (*first, *IMPORTS)), *([given] if given else [])])
