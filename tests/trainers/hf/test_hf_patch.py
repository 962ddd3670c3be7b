"""`channel_metrics.patches.hf_trainer` and `channel-metrics run`, in real processes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hf_tools import channel_logs, make_records, train
from paths import ROOT, python_path
from transformers import Trainer

from channel_metrics.cli.diagnosis import PATCH_MODULES
from channel_metrics.trainers.hf import ChannelMetricsMixin, attach

# What a user has: knows nothing of channel metrics.
SCRIPT = """
import json, sys
from pathlib import Path
from hf_tools import make_records, train
if __name__ == "__main__":
    trainer = train(Path(sys.argv[1]), records=make_records(16), dataloader_num_workers=1)
    log = {"argv": sys.argv, "path": sys.path[0], "log": trainer.state.log_history}
    Path(sys.argv[1], "log.json").write_text(json.dumps(log))
    sys.exit(7)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "train.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return path


def run_python(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": python_path()} | (env or {}),
        check=False,
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_apply_is_idempotent_and_reversible(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.__init__
    # Another test of this process may have imported it, and reverted it, before.
    monkeypatch.delitem(sys.modules, "channel_metrics.patches.hf_trainer", raising=False)
    patch = importlib.import_module("channel_metrics.patches.hf_trainer")
    try:
        patched = Trainer.__init__
        assert patch.is_applied() and patched is not original
        patch.apply()
        assert Trainer.__init__ is patched
        trainer = train(tmp_path)
        assert channel_logs(trainer) == channel_logs(train(tmp_path, prepare=attach))
        patch.revert()
        assert Trainer.__init__ is original and not patch.is_applied()
        patch.revert()
        assert Trainer.__init__ is original
        assert not channel_logs(train(tmp_path))
        patch.apply()
        assert patch.is_applied()
    finally:
        patch.revert()
    assert "patched transformers.Trainer.__init__" in capfd.readouterr().err


def test_a_mixin_class_keeps_its_own_config(tmp_path: Path) -> None:
    import channel_metrics.patches.hf_trainer as patch

    class Mixed(ChannelMetricsMixin, Trainer):
        pass

    patch.apply()
    try:
        trainer = train(tmp_path, trainer_class=Mixed)
    finally:
        patch.revert()
    assert type(trainer) is Mixed and channel_logs(trainer)


def test_run_leaves_the_script_unmodified(tmp_path: Path, script: Path) -> None:
    """Arguments, sys.path, worker processes and the exit code are the script's own."""
    plain = run_python(str(script), str(tmp_path), "--patch", "mine")
    assert plain.returncode == 7, plain.stderr
    without = json.loads((tmp_path / "log.json").read_text())
    command = ("-m", "channel_metrics", "run", "--patch", "hf_trainer")
    result = run_python(*command, str(script), str(tmp_path), "--patch", "mine")
    assert result.returncode == 7, result.stderr
    with_metrics = json.loads((tmp_path / "log.json").read_text())
    assert (
        with_metrics["argv"] == without["argv"] == [str(script), str(tmp_path), "--patch", "mine"]
    )
    assert with_metrics["path"] == without["path"] == str(script.parent)
    assert with_metrics["log"][0]["bbu_tokens"] > 0
    assert with_metrics["log"][0]["loss"] == without["log"][0]["loss"]
    assert result.stderr.count("channel metrics: patched") == 1


def test_run_reads_the_metrics_config_under_accelerate_launch(tmp_path: Path, script: Path) -> None:
    config = tmp_path / "metrics.yaml"
    config.write_text('metrics: [loss]\nkey_format: "{metric}_{channel}"\n')
    script.write_text(SCRIPT.replace("sys.exit(7)", ""))
    result = run_python(
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("-m", "channel_metrics", "run", "--patch", "hf_trainer", "--config", str(config)),
        *(str(script), str(tmp_path)),
    )
    assert result.returncode == 0, result.stderr
    entry = json.loads((tmp_path / "log.json").read_text())["log"][0]
    assert "loss_bbu" in entry
    assert "tokens_bbu" not in entry


def test_run_says_what_is_wrong_before_anything_runs(tmp_path: Path, script: Path) -> None:
    unknown = run_python("-m", "channel_metrics", "run", "--patch", "hf", str(script))
    assert unknown.returncode == 2
    assert f"unknown patch 'hf'; there are {', '.join(PATCH_MODULES)}" in unknown.stderr
    missing = run_python("-m", "channel_metrics", "run", "--patch", "hf_trainer", "nowhere.py")
    assert missing.returncode == 2 and "'nowhere.py' does not exist" in missing.stderr
    assert "Traceback" not in unknown.stderr + missing.stderr


def test_a_failing_script_keeps_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "from channel_metrics import ChannelError\nraise ChannelError('of the script')"
    )
    result = run_python("-m", "channel_metrics", "run", "--patch", "hf_trainer", str(script))
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "of the script" in result.stderr


def test_signals_reach_the_script(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "channel_metrics", "run", "--patch", "hf_trainer", str(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        # The script itself sleeps longer than this.
        assert process.wait(timeout=30) == 42


TORCHRUN_SCRIPT = """
import json, os, sys, time
from pathlib import Path
from accelerate.state import AcceleratorState, PartialState
from gloo_workers import SECONDS_FOR_WORKERS
from hf_tools import make_records, train
folder = Path(sys.argv[1])
# Without use_cpu, on a machine without an accelerator, transformers makes a process group and
# yet each process trains by itself, on all records.
alone, ddp = {"use_cpu": False, "max_steps": 4}, {"ddp_backend": "gloo", "max_steps": 2}
for name, settings in (("alone", alone), ("ddp", ddp)):
    trainer = train(folder, records=make_records(16), **settings)
    ranks = trainer.accelerator.num_processes
    log = {"ranks": ranks, "log": trainer.state.log_history}
    (folder / f"{name}{os.environ['RANK']}.json").write_text(json.dumps(log))
    AcceleratorState._reset_state()
    PartialState._reset_state()
time.sleep(SECONDS_FOR_WORKERS)
"""


def test_under_torchrun(tmp_path: Path, script: Path) -> None:
    """`torchrun ... -m channel_metrics run ...`: every token once, on all ranks."""
    script.write_text(TORCHRUN_SCRIPT)
    launched = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "channel_metrics", "run", "--patch", "hf_trainer", str(script), str(tmp_path)),
        env={"OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr
    assert launched.stderr.count("channel metrics: patched") == 1
    supervised = sum(label != -100 for r in make_records(16) for label in r["labels"][1:])
    for name, ranks in (("alone", 1), ("ddp", 2)):
        for rank in (0, 1):
            run = json.loads((tmp_path / f"{name}{rank}.json").read_text())
            assert run["ranks"] == ranks
            tokens = sum(v for entry in run["log"] for k, v in entry.items() if "_tokens" in k)
            assert tokens == supervised, (name, rank)
