"""What `pip install` gives: the wheel and the sdist hold the tree, and work away from it."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
# What the tests need beside the package.
FOLDERS = (".ci", ".github", "benchmarks", "configs", "constraints", "docs", "scripts", "tests")
FILES = (
    *("CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "Makefile"),
    *("SECURITY.md", "mkdocs.yml"),
)
BUILD = """
import sys
from setuptools import build_meta
target = sys.argv[1]  # the build replaces sys.argv
build_meta.build_wheel(target)
build_meta.build_sdist(target)
"""


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(tree: Path, target: Path) -> tuple[Path, Path]:
    """(wheel, sdist) of the tree; the build backend is called as pip would call it."""
    target.mkdir()
    run(sys.executable, "-c", BUILD, str(target), cwd=tree)
    (wheel,) = target.glob("*.whl")
    (sdist,) = target.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Built from a copy: setuptools reuses what older builds left in the tree."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("channel_metrics", "patches", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", *FILES):
        shutil.copy(ROOT / name, tree)
    return build(tree, folder / "dist")


@pytest.fixture(scope="session")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has the wheel, and the rest from this one."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run(*pip, "install", "--no-deps", "--no-index", str(built[0]), cwd=folder)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder)})
    # A folder in a .pth file: its own .pth files, the editable install among them, are not read.
    (Path(purelib) / "rest.pth").write_text(sysconfig.get_path("purelib") + os.linesep)
    return python


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def names_in_tree() -> set[str]:
    package = ROOT / "channel_metrics"
    paths = [*package.rglob("*.py"), *(package / "analysis" / "report" / "page").iterdir()]
    files = {str(path.relative_to(ROOT)) for path in paths}
    patches = (path.relative_to(ROOT / "patches") for path in (ROOT / "patches").rglob("*.py"))
    return files | {f"channel_metrics/patches/{p}" for p in patches} | {"channel_metrics/py.typed"}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_tree_and_nothing_else(built: tuple[Path, Path]) -> None:
    assert names_in(built[0]) == names_in_tree()


def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    wheel, _ = build(tree, tmp_path / "dist")
    assert names_in(wheel) == names_in(built[0])


def test_the_tests_run_from_the_sdist(built: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    for folder in FOLDERS:
        ours, theirs = (
            {
                str(path.relative_to(root))
                for path in (root / folder).rglob("*")
                if path.is_file() and "__pycache__" not in path.parts
            }
            for root in (ROOT, tree)
        )
        assert ours == theirs
    assert all((tree / name).exists() for name in FILES)
    # Some that need the data of configs/, helpers, the patches and the page of the report.
    patched = "test_a_checkout_that_is_not_installed_can_be_patched_from_its_root"
    chosen = (
        *("core/test_labels.py", "demo/test_train_config.py"),
        f"project/test_patches_package.py::{patched}",
    )
    tests = [f"tests/{name}" for name in chosen]
    printed = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=tree)
    assert " passed" in printed


def test_torch_is_the_only_dependency(built: tuple[Path, Path]) -> None:
    required = metadata(built[0]).get_all("Requires-Dist", [])
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.4"]


def test_no_extra_pins_or_caps_a_version(built: tuple[Path, Path]) -> None:
    required = metadata(built[0]).get_all("Requires-Dist", [])
    assert len(required) > 10
    for line in required:
        requirement = line.partition(";")[0]
        assert not set("<~!") & set(requirement), line
        assert "==" not in requirement, line


@pytest.mark.parametrize(
    "name",
    ["python", "torch", "transformers", "accelerate", "trl", "peft", "datasets", "lightning"],
)
def test_the_lowest_promised_release_was_run(name: str) -> None:
    """`make matrix` has run it, without a failure."""
    promised = re.search(rf'"{name}>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    if name == "python":
        promised = re.search(
            r'requires-python = ">=([0-9.]+)"', (ROOT / "pyproject.toml").read_text()
        )
    rows = json.loads((ROOT / "tests" / "matrix" / "results.json").read_text()).values()
    run = [
        Version(row["versions"][name])
        for row in rows
        if name in row["versions"] and not row["failed"]
    ]
    assert promised and f"{min(run)}.".startswith(f"{promised[1]}.")


def test_the_lowest_promised_megatron_was_run() -> None:
    """By hand; the table on its page says with which versions. The patch refuses older ones."""
    promised = re.search(r'"megatron-core>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    page = (ROOT / "docs" / "megatron.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| main .*$", page, re.MULTILINE)
    run = [Version(found) for found in re.findall(r"\d+\.\d+\.\d+", row)]
    assert promised and f"{min(run)}.".startswith(f"{promised[1]}.")
    assert f"from core {promised[1]} on" in page


@pytest.mark.parametrize(
    ("name", "file"),
    [("ms-swift", "main"), ("deepspeed", "main"), ("transformer-engine", "sources")],
)
def test_the_lowest_promised_release_is_that_of_make_test(name: str, file: str) -> None:
    pattern = rf'"{name}(?:\[pytorch\])?>=([0-9.]+)"'
    promised = re.search(pattern, (ROOT / "pyproject.toml").read_text())
    pins = (ROOT / "constraints" / f"{file}.txt").read_text().replace("_", "-")
    held = re.search(rf"^{name}==(.+)$", pins, re.MULTILINE)
    assert promised and held and held[1].startswith(f"{promised[1]}.")


@pytest.mark.parametrize(
    "held",
    [
        {"transformers": "5.6.2"},
        {"transformers": "4.51.3", "accelerate": "1.6.0", "trl": "0.19.0", "torch": "2.4.1"},
    ],
)
def test_the_extras_move_nobodys_trainer(
    built: tuple[Path, Path], held: dict[str, str], tmp_path: Path
) -> None:
    """pip decides by the metadata of what is installed; `make matrix` asks it over real ones."""
    run(sys.executable, "-m", "venv", "--without-pip", "side", cwd=tmp_path)
    python = tmp_path / "side" / "bin" / "python"
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "side")}))
    for name, version in held.items():
        info = purelib / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    rest = [path for path in sys.path if path.endswith("site-packages")]
    (purelib / "rest.pth").write_text(os.linesep.join(rest))
    options = ("--dry-run", "--quiet", "--report", "-", "--no-index", "--no-cache-dir")
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", *options)
    report = run(*pip, f"{built[0]}[hf,trl,peft]", cwd=tmp_path)
    installed = [item["metadata"]["name"] for item in json.loads(report)["install"]]
    assert [name.replace("-", "_") for name in installed] == ["channel_metrics"]


def test_the_wheel_works_away_from_the_tree(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.metadata, importlib.util
import channel_metrics, channel_metrics.patches, channel_metrics.patches.hf_trainer
assert importlib.metadata.version("channel-metrics") == channel_metrics.__version__
assert importlib.util.find_spec("patches") is None, "the short name belongs to checkouts only"
print(channel_metrics.__file__)
print(channel_metrics.patches.__file__)
"""
    printed = run(str(installed), "-c", code, cwd=tmp_path).splitlines()[-2:]
    site = Path(sysconfig.get_path("purelib", vars={"base": str(installed.parents[1])}))
    assert printed == [
        str(site / "channel_metrics" / "__init__.py"),
        str(site / "channel_metrics" / "patches" / "__init__.py"),
    ]


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    printed = run(str(installed.parent / "channel-metrics"), "--help", cwd=tmp_path)
    assert "train" in printed
    assert "run" in printed
