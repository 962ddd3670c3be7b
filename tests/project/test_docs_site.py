"""`make docs` fails if a link is broken."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is only in the main environment"
)
def test_a_broken_link_fails(tmp_path: Path) -> None:
    (arguments,) = re.findall(r"/mkdocs (build.*)", (ROOT / "Makefile").read_text())
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs/faq.md").open("a", encoding="utf-8") as page:
        page.write("\n[broken](no_such_page.md)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0, done.stderr
    # The only one, so all other links of the pages resolve.
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert "'faq.md' contains a link 'no_such_page.md'" in warning
