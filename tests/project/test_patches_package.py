"""The files in `patches/`: two names, one patch, and packages that they must not hide."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from paths import PATCHES, ROOT

from channel_metrics.cli.diagnosis import PATCH_MODULES
from channel_metrics.trainers.patching import announce

INSTALLED = [entry for entry in sys.path if "site-packages" in entry]
# Without it, files for the start of Python are read, and with them what is installed as editable.
NOT_INSTALLED = f"import sys; sys.path += {INSTALLED}\n"


def run(code: str, cwd: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *flags, "-W", "ignore", "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "names",
    [
        ("patches.hf_trainer", "channel_metrics.patches.hf_trainer"),
        ("channel_metrics.patches.hf_trainer", "patches.hf_trainer"),
    ],
)
def test_both_names_patch_once(names: tuple[str, str]) -> None:
    code = f"""
import importlib
from transformers import Trainer
plain = Trainer.__init__
first = importlib.import_module({names[0]!r})
patched = Trainer.__init__
second = importlib.import_module({names[1]!r})
assert Trainer.__init__ is patched is not plain
importlib.reload(first)
assert Trainer.__init__ is patched
assert first.is_applied() and second.is_applied()
second.revert()
assert Trainer.__init__ is plain
assert not first.is_applied()
"""
    assert run(code, ROOT).stderr.count("channel metrics: patched") == 1


def test_a_checkout_that_is_not_installed_can_be_patched_from_its_root() -> None:
    code = """
import importlib.util
import patches.hf_trainer
assert patches.hf_trainer.is_applied()
try:
    import channel_metrics.patches
except ModuleNotFoundError:
    print("not installed")
"""
    assert run(NOT_INSTALLED + code, ROOT, "-S").stdout == "not installed\n"


def test_a_patch_that_does_not_exist_is_named() -> None:
    code = """
try:
    import patches.no_such_patch
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code, ROOT).stdout == "No module named 'patches.no_such_patch'\n"


def test_the_command_line_knows_the_same_patches_as_the_folder() -> None:
    files = {path.stem: path.read_text() for path in PATCHES.glob("*.py")}
    del files["__init__"]
    assert files.keys() == PATCH_MODULES.keys()
    for name, module in PATCH_MODULES.items():
        assert f"from {module} import apply" in files[name]


# What the importer of a package gets while a folder with a file of that name is first on the path.
HIDDEN = {
    "trl": """
import trl
assert trl.SFTConfig and "apply" not in vars(trl)
from trl import SFTTrainer
import transformers
plain = transformers.Trainer.__init__
""",
    "megatron": """
import megatron.core.utils
import megatron
assert "apply" not in vars(megatron)
sys.path.insert(0, folder)  # as ms-swift does again and again
from megatron.core import parallel_state
import megatron.core.tensor_parallel
""",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_folder_of_plugins_hides_no_package(name: str) -> None:
    code = f"""
import sys
folder = {str(PATCHES)!r}
sys.path.insert(0, folder)
{HIDDEN[name]}
assert sys.modules[{name!r}] is {name}
assert folder not in [str(path) for path in {name}.__path__]
"""
    assert "channel metrics: patched" not in run(code, ROOT).stderr


def test_the_folder_is_off_the_path_once_it_has_hidden_a_package() -> None:
    """Where there is no such package, the error is the usual one."""
    code = f"""
import sys
for name in ("trl", "megatron"):
    sys.path.insert(0, {str(PATCHES)!r})
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error)
    assert {str(PATCHES)!r} not in sys.path
    assert name not in sys.modules
"""
    printed = run(code, ROOT, "-S").stdout
    assert printed == "No module named 'trl'\nNo module named 'megatron'\n"


def test_a_plugin_is_applied_under_the_name_that_ms_swift_gives_it() -> None:
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(PATCHES)!r})
spec = importlib.util.spec_from_file_location("_swift_external_1", {str(PATCHES / "trl.py")!r})
plugin = sys.modules["_swift_external_1"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plugin)
assert plugin.is_applied()
import trl
assert trl.SFTConfig
"""
    assert "patched trl.SFTTrainer._prepare_dataset" in run(code, ROOT).stderr


@pytest.mark.parametrize(("rank", "printed"), [("0", "patched x\n"), ("1", "")])
def test_one_line_from_rank_0_says_what_was_patched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, printed: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    announce("patched x")
    assert capsys.readouterr().err == printed
