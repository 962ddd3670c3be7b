"""Nobody waits for what they do not use: what an import brings in, by the names of the modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"datasets", "jinja2", "matplotlib", "numpy", "pandas", "pyarrow", "torch", "transformers"}
CODE = """
import sys
before = set(sys.modules)
{statement}
print("imported", *{{name.partition(".")[0] for name in set(sys.modules) - before}})
"""


def imported_by(statement: str, *, first: str = "") -> set[str]:
    """The top-level packages that `statement` brings in, beyond the standard library.

    first: what is imported before, and not counted.
    """
    code = f"{first}\n{CODE.format(statement=statement)}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "imported"
    return set(last[1:]) - sys.stdlib_module_names


@pytest.mark.parametrize(
    "module",
    [
        "channel_metrics",
        "channel_metrics.config",
        "channel_metrics.core.labels",
        "channel_metrics.core.schema",
        "channel_metrics.errors",
        "channel_metrics.analysis.summary",
        "channel_metrics.analysis.readers.keys",
    ],
)
def test_reading_and_configuring_brings_in_no_other_package(module: str) -> None:
    assert imported_by(f"import {module}") == {"channel_metrics"}


def test_everything_that_is_exported_brings_in_torch_and_no_other_package() -> None:
    # torch itself brings in more, such as numpy where it is installed.
    imported = imported_by("from channel_metrics import *", first="import torch")
    assert imported == {"channel_metrics"}


def test_the_help_of_the_commands_waits_for_no_heavy_package() -> None:
    statement = (
        "from channel_metrics.cli import main\n"
        "sys.argv = ['channel-metrics', '--help']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert not done.code"
    )
    imported = imported_by(statement)
    assert {"channel_metrics", "typer"} <= imported
    assert not imported & HEAVY


@pytest.mark.parametrize("module", ["run", "write", "report.html", "watch.screen"])
def test_reading_runs_does_not_bring_in_torch(module: str) -> None:
    assert "torch" not in imported_by(f"import channel_metrics.analysis.{module}")
