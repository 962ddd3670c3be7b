"""`patches` of a checkout and `channel_metrics.patches` are one package, in either import order."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROBE = "APPLIED = []\nAPPLIED.append(__name__)\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one more patch, which counts how often it is applied."""
    for name in ("channel_metrics", "patches"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "patches" / "probe.py").write_text(PROBE)
    return tmp_path


def run(code: str, cwd: Path, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "names",
    [
        ("patches.probe", "channel_metrics.patches.probe"),
        ("channel_metrics.patches.probe", "patches.probe"),
    ],
)
def test_both_names_give_one_module(checkout: Path, names: tuple[str, str]) -> None:
    code = f"""
import importlib, sys
sys.path.insert(0, "")
import patches
first, second = (importlib.import_module(name) for name in {names})
assert first is second, (first, second)
assert first.APPLIED == ["channel_metrics.patches.probe"], first.APPLIED
assert first.__name__ == first.__spec__.name == "channel_metrics.patches.probe"
import channel_metrics.patches
assert sys.modules["patches"] is channel_metrics.patches
assert patches.probe is channel_metrics.patches.probe is first
assert importlib.reload(first) is first
print(first.__file__)
"""
    # -S hides what is installed: the bare checkout must do. The core's own imports need torch.
    (checkout / "channel_metrics" / "__init__.py").write_text("")
    printed = run(code, checkout, "-S")
    assert Path(printed).resolve() == checkout / "patches" / "probe.py"


def test_the_installed_package_is_reached_from_the_root_of_a_checkout() -> None:
    code = """
import patches.hf_trainer as short
import channel_metrics.patches.hf_trainer as long
assert short is long, (short, long)
assert short.is_applied()
short.revert()
assert not long.is_applied()
"""
    run(code, ROOT)


def test_a_patch_that_does_not_exist_is_named() -> None:
    code = """
try:
    import patches.no_such_patch
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code, ROOT) == "No module named 'patches.no_such_patch'"


@pytest.mark.parametrize(("rank", "printed"), [("0", "patched x\n"), ("1", "")])
def test_one_line_from_rank_0_says_what_was_patched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, printed: str
) -> None:
    from channel_metrics.patches import announce

    monkeypatch.setenv("RANK", rank)
    announce("patched x")
    assert capsys.readouterr().err == printed
