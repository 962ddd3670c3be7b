"""The commands as they are typed: exit codes, messages, what stands where."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from channel_metrics.cli.main import app

ROOT = Path(__file__).parents[2]
FUSED = ROOT / "configs" / "fused_data"


def command(*args: object, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    hidden = {"FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"}
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [sys.executable, "-m", "channel_metrics", *map(str, args)],
        env=env | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=200,
    )


def invoke(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", ["train", "check", "doctor", "run"])
def test_help(name: str) -> None:
    code, out, _ = invoke(name, "--help")
    assert code == 0
    assert "Usage" in out


def test_help_is_quick_because_it_imports_little() -> None:
    code = (
        "import sys; sys.argv = ['channel-metrics', '--help']\n"
        "from channel_metrics.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'transformers', 'datasets', 'pydantic', 'rich', 'torch', 'yaml'}\n"
        "print('LOADED', slow & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "LOADED set()" in done.stdout
    assert "train" in done.stdout


def test_train_prints_table_folder_and_tensorboard_and_is_plain_in_a_pipe(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    done = command("train", FUSED / "debug.yaml", "--output-dir", folder, "--max-steps", 2)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "lang_chat" in done.stdout
    assert f"run folder:  {folder}\n" in done.stdout
    assert f"tensorboard --logdir '{folder}'" in done.stdout
    assert (folder / "trainer_state.json").exists()


def test_our_errors_are_one_message_and_exit_code_2(tmp_path: Path) -> None:
    done = command("train", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_broken_line_is_named_before_training(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n')
    config = tmp_path / "run.yaml"
    config.write_text("sources: {a: {path: a.jsonl}}\nmodel: {tiny: {}}\n")
    code, out, err = invoke("train", config, "--output-dir", tmp_path / "run")
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'a.jsonl'}:2" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("record", "code"), [({"channel": "a", "text": "b"}, 0), ({"text": "b"}, 1), ("no object", 2)]
)
def test_exit_codes_of_check(tmp_path: Path, record: Any, code: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    assert invoke("check", path)[0] == code


def test_check_shows_fields_channels_and_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"src": "a b"}, {"src": "a_b"}, {"other": 1}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, _ = invoke("check", path, "--field", "src")
    assert code == 1, "training would refuse these names"
    assert "field src: channel of 2 records" in out
    assert "no field: 1 records" in out
    assert "problem: channels 'a b' and 'a_b'" in out


SCRIPT = """
import sys
print(sys.argv[1:])
if "fail" in sys.argv: sys.exit(7)
if "break" in sys.argv: raise KeyboardInterrupt
if "ours" in sys.argv:
    from channel_metrics import ChannelTable
    ChannelTable(["a b", "a_b"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is once installed: with patches/ inside."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "channel_metrics", folder / "channel_metrics")
    shutil.copytree(ROOT / "patches", folder / "channel_metrics" / "patches")
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_run_leaves_everything_after_the_script_to_it(script: Path, installed: Path) -> None:
    args = ["--patch", "x", "--help", "--", "-v", "fail"]
    done = command("run", script, *args, root=installed)
    assert done.stdout == f"{args}\n"
    assert done.returncode == 7


def test_run_of_a_link_looks_for_modules_beside_its_target(tmp_path: Path, installed: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "script.py"
    real.mkdir()
    (real / "helper.py").write_text("VALUE = 5")
    (real / "script.py").write_text(
        "import helper, sys\nprint(helper.VALUE, sys.path[0], __file__)"
    )
    link.symlink_to(real / "script.py")
    theirs = subprocess.run([sys.executable, link], capture_output=True, text=True, check=True)
    assert theirs.stdout == f"5 {real} {link}\n"
    assert command("run", link, root=installed).stdout == theirs.stdout


MODULE = """
import sys
from . import helper
print(sys.argv[1:], __name__, __package__, helper.VALUE, sys.path[0], sys.argv[0])
assert sys.modules["__main__"].__dict__ is globals()
"""


def test_run_of_a_module_is_that_of_python_m(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "package" / "inner"
    inner.mkdir(parents=True)
    (inner / "__init__.py").touch()
    (inner / "helper.py").write_text("VALUE = 5")
    for name in ("module", "__main__"):
        (inner / f"{name}.py").write_text(MODULE)
    env = os.environ | {"PYTHONPATH": str(installed)}
    run = [sys.executable, "-m", "channel_metrics", "run", "-m"]
    for name in ("package.inner.module", "package.inner"):
        args = [name, "--patch", "x", "-m", "--", "-v"]
        theirs, ours = (
            subprocess.run(
                [*command, *args], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
            ).stdout
            for command in ([sys.executable, "-m"], run)
        )
        assert theirs == ours
        assert "['--patch', 'x', '-m', '--', '-v'] __main__ package.inner 5" in ours
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("package.inner.none", "the module 'package.inner.none' does not exist"),
        ("package.inner.helper.deeper", "does not exist"),
        ("none.module", "the module 'none.module' does not exist"),
        ("package", "'package' is a package without a __main__ module"),
    ):
        code, out, err = invoke("run", "-m", name)
        assert (code, out) == (2, "") and message in err


def test_run_keeps_traceback_and_signal_of_the_script(script: Path, installed: Path) -> None:
    ours = command("run", script, "ours", root=installed)
    assert ours.returncode == 1
    assert "Traceback" in ours.stderr
    interrupted = command("run", script, "break", root=installed)
    assert interrupted.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in interrupted.stderr


def test_run_refuses_what_it_does_not_know(script: Path, installed: Path) -> None:
    done = command("run", "--patch", "hf_trainr", script, root=installed)
    assert done.returncode == 2
    assert "unknown patch 'hf_trainr'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.core") is None
    or importlib.util.find_spec("megatron.training") is not None,
    reason="needs a megatron-core that the patch does not fit, as in `make test`",
)
def test_a_patch_that_does_not_fit_ends_the_run_with_its_message(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('begun', flush=True)\nimport megatron.core\nprint('imported')")
    done = command("run", "--patch", "megatron", script)
    assert (done.returncode, done.stdout) == (2, "begun\n")
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: channel metrics wrap functions that megatron-core ")
    assert "--channels needs Megatron-LM core 0.13 or later" in last
    assert "Traceback" not in done.stderr


def test_missing_packages_are_named_with_their_extra(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('no typer', name='typer')")
    done = subprocess.run(
        [sys.executable, "-m", "channel_metrics", "--help"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'channel_metrics[cli]'" in done.stderr


def test_generated_data_is_what_stands_in_the_repository(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FUSED / "generate.py", tmp_path], check=True)
    made, kept = ({p.name: p.read_bytes() for p in d.glob("*.jsonl")} for d in (tmp_path, FUSED))
    assert made == kept
    assert sum(map(len, kept.values())) < 400_000
