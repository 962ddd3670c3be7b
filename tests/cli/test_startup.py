"""How patches come into a process below `channel-metrics run`, and what the run says in the end."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT, python_path

from channel_metrics import ChannelMetrics, MicroBatch, startup
from channel_metrics.cli.children import missed
from channel_metrics.run_marks import RUN_VARIABLE, mark
from channel_metrics.startup import sitecustomize
from channel_metrics.startup.sitecustomize import PATCHES, PATCHES_VARIABLE, PatchFinder

STARTUP = Path(startup.__file__).parent
RUN = ("-m", "channel_metrics", "run", "--patch", "hf_trainer")


def python(
    *arguments: object, cwd: Path, executable: object = sys.executable, **environ: str
) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "RANK", RUN_VARIABLE, PATCHES_VARIABLE)
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [str(executable), *map(str, arguments)],
        env=env | environ,
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )


# ---- the end of a run ---------------------------------------------------------------------


CHILD = """
import os, sys
print([name for name in ("torch", "channel_metrics") if name in sys.modules])
print([type(finder).__name__ for finder in sys.meta_path].count("PatchFinder"))
print([entry for entry in sys.path if "startup" in entry])
"""

PARENT = """
import os, subprocess, sys
if os.fork() == 0:
    sys.exit(0)
os.wait()
code = "import os; print(os.path.isdir(os.environ['CHANNEL_METRICS_RUN']))"
inner = ["-m", "channel_metrics", "run", "--patch", "trl", "child.py"]
for arguments in (["child.py"], ["-m", "child"], inner, ["-c", code]):
    subprocess.run([sys.executable, *arguments], check=True)
print(os.environ["CHANNEL_METRICS_RUN"])
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_without_a_trainer_says_so_once_and_leaves_nothing(tmp_path: Path, rank: str) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    main = ("parent.py",) if rank == "0" else ("-m", "parent")
    done = python(*RUN, *main, 0, cwd=tmp_path, RANK=rank, PYTHONPATH=str(ROOT))
    plain = ["[]", "1", "[]"]
    *printed, folder = done.stdout.splitlines()
    # The third child is a run itself: there is the hook of Python's start, and that of the run.
    assert printed == [*plain, *plain, "['channel_metrics']", "2", "[]", "True"]
    assert not Path(folder).exists()
    if rank == "1":
        assert done.stderr == ""
        return
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "channel metrics: no channel was logged, because no process of this run imported "
        "transformers.trainer, which --patch hf_trainer waits for."
    )
    assert done.returncode == 0


# Trains with records that name no channel; or is only about to.
TRAINS = """
import sys
from pathlib import Path
from hf_tools import make_records, train
if sys.argv[1] == "train":
    records = [{**record, "channel": None} for record in make_records(16)]
    train(Path("run"), records=records)
"""


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("import", "no channel was logged, because no trainer that --patch hf_trainer knows was"),
        ("train", "no channel was logged. Either no record names one (`channel-metrics check`"),
    ],
)
def test_the_last_line_says_what_a_run_did_not_meet(tmp_path: Path, does: str, said: str) -> None:
    (tmp_path / "trains.py").write_text(TRAINS)
    done = python(*RUN, "trains.py", does, cwd=tmp_path, PYTHONPATH=python_path())
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"channel metrics: {said}")


def test_a_run_inside_a_run_is_reached_behind_the_sitecustomize_of_others(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "inner.py").write_text(
        "import subprocess, sys; subprocess.run([sys.executable, 'child.py'], check=True)"
    )
    # Somebody has put their own folder before ours.
    path = os.pathsep.join([str(tmp_path), str(STARTUP), str(ROOT)])
    done = python(*RUN, "inner.py", cwd=tmp_path, PYTHONPATH=path)
    assert done.stdout.splitlines() == ["theirs", "theirs", "[]", "1", "[]"]


def test_a_script_that_fails_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import sys; sys.exit('mine')")
    done = python(*RUN, "fails.py", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (1, "mine\n")


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ({"patched", "session", "channel"}, None),
        ({"patched", "session"}, "no record names one"),
        ({"patched"}, "no trainer that --patch hf_trainer megatron knows was made. Megatron's"),
        (
            set(),
            "imported megatron.core or transformers.trainer, which --patch hf_trainer megatron",
        ),
    ],
)
def test_what_was_missing_is_said(marks: set[str], said: str | None) -> None:
    line = missed(["hf_trainer", "megatron"], marks)
    assert line is None if said is None else line is not None and said in line


def test_a_session_marks_that_there_is_one_and_that_it_logs_a_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path))
    metrics = ChannelMetrics()
    for step, name in enumerate((None, "bbu")):
        assert {path.name for path in tmp_path.iterdir()} == {"session"}
        metrics.count(MicroBatch(token_losses=torch.ones(1, 2), channels=[name]))
        metrics.close(step)
    assert {path.name for path in tmp_path.iterdir()} == {"session", "channel"}
    assert not mark("channel") and mark("other")
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path / "gone"))
    assert mark("channel")


# ---- the hook -----------------------------------------------------------------------------


@pytest.fixture
def finder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PatchFinder]:
    """One that applies `their_patch` after `theirs.part.trainer`; both are in `tmp_path`."""
    package = tmp_path / "theirs" / "part"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from theirs.part import trainer\nREADY = True\n")
    (package / "trainer.py").touch()
    (tmp_path / "their_patch.py").write_text(
        "import theirs\napplied = []\ndef apply(): applied.append(theirs.part.READY)\n"
    )
    monkeypatch.setitem(PATCHES, "theirs", {"theirs.part.trainer": "their_patch"})
    monkeypatch.syspath_prepend(tmp_path)
    found = PatchFinder()
    yield found
    sys.meta_path.remove(found)
    for name in ("theirs", "theirs.other", "theirs.part", "theirs.part.trainer", "their_patch"):
        sys.modules.pop(name, None)


def test_a_patch_is_applied_when_its_package_is_complete(finder: PatchFinder) -> None:
    finder.watch(["theirs"])
    applied = import_module("their_patch").applied
    trainer = import_module("theirs.part").trainer

    assert applied == [True]
    assert type(trainer.__loader__).__name__ == "SourceFileLoader"
    assert trainer.__spec__.loader is trainer.__loader__


def test_a_patch_is_applied_at_once_if_its_module_is_there(finder: PatchFinder) -> None:
    import_module("theirs.part")
    finder.watch(["theirs"])
    assert sys.modules["their_patch"].applied == [True]


def test_a_thread_does_not_apply_a_patch_while_another_one_imports(
    finder: PatchFinder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PATCHES["theirs"], "theirs.later", "their_patch")
    (tmp_path / "theirs" / "part" / "__init__.py").write_text(
        "import threading\n"
        "from theirs.part import trainer\n"
        "thread = threading.Thread(target=__import__, args=('theirs.other',))\n"
        "thread.start()\n"
        "thread.join()\n"
        "READY = True\n"
    )
    (tmp_path / "theirs" / "other.py").touch()
    finder.watch(["theirs"])
    import_module("theirs.part")
    assert sys.modules["their_patch"].applied == [True]


def test_a_search_for_a_module_applies_nothing(finder: PatchFinder) -> None:
    finder.watch(["theirs"])
    spec = find_spec("theirs.part")
    assert isinstance(spec, ModuleSpec) and spec.origin is not None
    loader: Any = spec.loader
    assert loader.get_filename() == spec.origin, "the loader answers as without us"
    assert find_spec("theirs.none") is None
    assert "their_patch" not in sys.modules


# ---- any Python ---------------------------------------------------------------------------


def test_the_sitecustomize_of_others_is_called_as_before(tmp_path: Path) -> None:
    theirs = tmp_path / "sitecustomize.py"
    both = os.pathsep.join([str(STARTUP), str(tmp_path)])
    code = "import sys, sitecustomize; print(sitecustomize.__file__, len(sys.path))"
    for text in ("print('theirs')", "1 / 0", "import nothing_of_this_name"):
        theirs.write_text(text)
        with_ours, without = (
            python("-c", code, cwd=ROOT, PYTHONPATH=path, **{PATCHES_VARIABLE: "hf_trainer"})
            for path in (both, str(tmp_path))
        )
        assert with_ours.stdout == without.stdout
        assert with_ours.stderr == without.stderr
        assert with_ours.returncode == without.returncode


@pytest.mark.parametrize("flag", ["-S", "-E", "-I"])
def test_a_python_that_ignores_the_environment_goes_on(tmp_path: Path, flag: str) -> None:
    environ = {"PYTHONPATH": str(STARTUP), PATCHES_VARIABLE: "hf_trainer"}
    done = python(flag, "-c", CHILD, cwd=tmp_path, **environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:2] == ["[]", "0"]


@pytest.mark.parametrize("patches", [None, ""])
def test_without_its_variable_the_hook_does_nothing(tmp_path: Path, patches: str | None) -> None:
    environ = {} if patches is None else {PATCHES_VARIABLE: patches}
    done = python("-c", CHILD, cwd=tmp_path, PYTHONPATH=str(STARTUP), **environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["[]", "0", "[]"]


def test_a_python_without_channel_metrics_says_so_only_if_it_trains(tmp_path: Path) -> None:
    venv.create(tmp_path / "other", with_pip=False)
    trainer = tmp_path / "transformers" / "trainer.py"
    trainer.parent.mkdir()
    trainer.touch()
    environ = {"PYTHONPATH": str(STARTUP), PATCHES_VARIABLE: "hf_trainer,unknown"}
    other = tmp_path / "other" / "bin" / "python"
    for code, said in (
        ("import transformers", ""),
        (
            "import transformers.trainer",
            f"channel metrics: {other} does not have channel_metrics, so this process has no "
            "metrics.\n",
        ),
    ):
        done = python("-c", code, cwd=tmp_path, executable=other, **environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", said)


def test_the_folder_on_pythonpath_holds_no_name_of_others() -> None:
    assert {path.stem for path in STARTUP.glob("*.py")} == {"__init__", "sitecustomize"}
    assert sitecustomize.finder not in sys.meta_path, "the tests are no run"
