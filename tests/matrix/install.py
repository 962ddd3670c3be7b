"""Installs a row of the matrix: a small environment over one that has torch.

All environments are below `.venv-matrix/`. A base has torch and the test tools. A row has the
packages that it names, and reads everything else from its base, so torch is installed once.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from matrix.rows import PACKAGES, Row

__all__ = ["CACHE", "ROOT", "changes", "install", "versions"]

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".venv-matrix"
# What the tests need beside the packages of a row, and what is large and the same for all rows.
_TOOLS = (
    *("setuptools>=77", "hypothesis", "ipython", "pytest", "pytest-timeout", "tensorboard"),
    *("pydantic", "pyyaml", "rich", "typer"),
    *("pandas", "pyarrow"),
    "requests",  # GRPO of trl 1.5 imports it, and does not ask for it
)


def install(row: Row) -> Path:
    """Make the environment of a row, if it is not there yet. Returns its Python."""
    base, folder = CACHE / row.base, CACHE / row.name
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(row.requirements)
    if done.exists() and done.read_text() == wanted:
        return python
    _make_base(row, base)
    _run(str(base / "bin" / "python"), "-m", "venv", "--clear", "--without-pip", str(folder))
    _link(folder, base)
    _pip(python, "install", f"torch=={row.torch}", *row.requirements)
    # Alone, so that `changes` has seen what an installation of ours would do to these versions.
    moved = changes(python, row.extras)
    if moved:
        raise SystemExit(f"{row.name}: channel_metrics[{row.extras}] would install {moved}")
    _pip(python, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    done.write_text(wanted)
    return python


def changes(python: Path, extras: str) -> list[str]:
    """The packages that an installation with these extras would install beside our own."""
    report = _pip(
        python,
        *("install", "--dry-run", "--quiet", "--report", "-", "--no-build-isolation"),
        f"{ROOT}[{extras}]",
    )
    found = [item["metadata"] for item in json.loads(report)["install"]]
    others = [item for item in found if item["name"] not in ("channel_metrics", "channel-metrics")]
    return [f"{item['name']} {item['version']}" for item in others]


def versions(python: Path) -> dict[str, str]:
    """{package: version} of what a row is about, as far as it is installed, and of Python."""
    code = (
        "import json, platform; from importlib.metadata import distributions; "
        "found = {d.name: d.version for d in reversed(list(distributions()))}; "
        f"names = {('torch', *PACKAGES)}; "
        "found = {n: found[n] for n in names if n in found}; "
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    found: dict[str, str] = json.loads(_run(str(python), "-c", code))
    return found


def _make_base(row: Row, base: Path) -> None:
    done = base / "installed"
    if done.exists():
        return
    python = _run(str(ROOT / "scripts" / "make_env"), "python", row.python).strip()
    _run(python, "-m", "venv", "--clear", str(base))
    _pip(base / "bin" / "python", "install", f"torch=={row.torch}", *_TOOLS)
    done.touch()


def _link(folder: Path, base: Path) -> None:
    purelib, base_purelib = (
        next((path / "lib").glob("python3.*")) / "site-packages" for path in (folder, base)
    )
    (purelib / "base.pth").write_text(str(base_purelib) + os.linesep)


def _pip(python: Path, *arguments: str) -> str:
    return _run(str(python), "-m", "pip", "--no-input", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout
