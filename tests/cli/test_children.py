"""`channel-metrics run` of a script that starts launchers and processes: real ones, all at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from paths import python_path

# About 75 s of CPU time; this is for machines that do other work, too.
SECONDS = 600
pytestmark = pytest.mark.timeout(SECONDS)

# Knows nothing of channel metrics. The argument names the file of its log.
TRAIN = """
import json, os, sys, time
from pathlib import Path
def main(name):
    from gloo_workers import SECONDS_FOR_WORKERS
    from hf_tools import make_records, train
    ranks = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    folder = Path(os.environ["FOLDER"])
    trainer = train(folder / name, records=make_records(16), **ranks)
    path = folder / f"{name}{trainer.args.process_index}.json"
    path.write_text(json.dumps(trainer.state.log_history))
    time.sleep(10 * SECONDS_FOR_WORKERS)  # Here, the other launchers run at the same time.
if __name__ == "__main__":
    main(sys.argv[-1])
"""

# Uses the library itself. Its import begins before that of the trainer, and ends after it.
OURS = f"import channel_metrics.trainers.hf\n{TRAIN}"

# Starts processes by itself, with the standard library and with accelerate.
STARTS = """
import multiprocessing, sys
from train import main
def find(queue):
    queue.put([type(finder).__name__ for finder in sys.meta_path])
def has_finder(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=find, args=(queue,))
    process.start()
    found = queue.get()
    process.join()
    return "PatchFinder" in found
if __name__ == "__main__":
    spawned = multiprocessing.get_context("spawn").Process(target=main, args=("spawn",))
    spawned.start()
    spawned.join()
    print("finders", has_finder("forkserver"), has_finder("fork"))
    import transformers.trainer
    from accelerate import debug_launcher, notebook_launcher
    debug_launcher(main, ("fork",), num_processes=2)
    # Any free port.
    free = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    notebook_launcher(main, ("notebook",), num_processes=2, **free)
    sys.exit(spawned.exitcode)
"""

# What `llamafactory-cli` does: starts a launcher, and ends with its exit code.
CLI = """
import subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]])
sys.exit(done.returncode)
"""

# Starts each command in a folder of its own.
MAIN = """
import json, os, subprocess, sys
from pathlib import Path
folder = Path(os.environ["FOLDER"])
started = {}
for name, command in json.loads(sys.argv[1]).items():
    cwd = folder / "cwd" / name
    cwd.mkdir(parents=True)
    out = open(folder / f"{name}.out", "w")
    started[name] = subprocess.Popen([sys.executable, *command], cwd=cwd, stdout=out, stderr=out)
codes = {name: process.wait() for name, process in started.items()}
marks = sorted(os.listdir(os.environ["CHANNEL_METRICS_RUN"]))
told = {"codes": codes, "marks": marks, "folder": os.environ["CHANNEL_METRICS_RUN"]}
(folder / "told.json").write_text(json.dumps(told | {"torch": "torch" in sys.modules}))
"""

RUN = ("-m", "channel_metrics", "run", "--patch", "hf_trainer")
COMMANDS = {
    "torchrun": "{cli} -m torch.distributed.run --standalone --nproc-per-node 2 {train} torchrun",
    "fails": "{cli} -m torch.distributed.run --standalone --nproc-per-node 1 {none}",
    "accelerate": "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no {ours} accelerate",
    "deepspeed": "-m deepspeed.launcher.runner --num_gpus 1 --master_port 0 {train} deepspeed",
    "starts": "{starts}",
}
if find_spec("deepspeed") is None:
    del COMMANDS["deepspeed"]


@dataclass
class Ran:
    folder: Path
    result: subprocess.CompletedProcess[str]
    told: dict[str, Any]

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()

    def log(self, name: str) -> list[dict[str, float]]:
        path = self.folder / f"{name}.json"
        assert path.exists(), "\n".join(p.read_text()[-3000:] for p in self.folder.glob("*.out"))
        found: list[dict[str, float]] = json.loads(path.read_text())
        return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("children")
    scripts = {"train": TRAIN, "ours": OURS, "starts": STARTS, "cli": CLI, "main": MAIN}
    scripts["none"] = "1 / 0"
    for name, code in scripts.items():
        (folder / f"{name}.py").write_text(code)
    (folder / "metrics.yaml").write_text('metrics: [tokens]\nkey_format: "{metric}_of_{channel}"\n')
    paths = {name: str(folder / f"{name}.py") for name in scripts}
    commands = {name: command.format(**paths).split() for name, command in COMMANDS.items()}
    result = subprocess.run(
        [sys.executable, *RUN, "--config", "metrics.yaml", "main.py", json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": python_path(), "FOLDER": str(folder)},
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS - 20,
    )
    assert result.returncode == 0, result.stderr
    return Ran(folder, result, json.loads((folder / "told.json").read_text()))


@pytest.mark.parametrize(
    "name",
    [
        *("torchrun0", "torchrun1", "accelerate0", "deepspeed0"),
        *("spawn0", "fork0", "fork1", "notebook0", "notebook1"),
    ],
)
def test_every_process_has_the_patch_and_the_config(ran: Ran, name: str) -> None:
    if name == "deepspeed0" and "deepspeed" not in COMMANDS:
        pytest.skip("deepspeed is not in this environment; `make test` runs this")
    first = ran.log(name)[0]
    assert first["tokens_of_bbu"] > 0
    assert not any("share" in key for key in first), "they found the config"


def test_processes_that_train_nothing_are_ready_for_it(ran: Ran) -> None:
    assert "finders True True" in ran.output("starts")


def test_exit_codes_and_tracebacks_are_those_of_the_launchers(ran: Ran) -> None:
    failed = {name for name, code in ran.told["codes"].items() if code}
    assert failed == {"fails"}
    assert "ZeroDivisionError" in ran.output("fails")


def test_the_run_says_once_what_was_patched_and_ends_without_a_complaint(ran: Ran) -> None:
    said = "".join(ran.output(name) for name in COMMANDS) + ran.result.stderr
    assert said.count("channel metrics: patched") == 1
    assert ran.result.stderr == ran.result.stdout == ""
    assert {"patched", "session", "channel"} < set(ran.told["marks"])
    assert not Path(ran.told["folder"]).exists()


def test_the_script_that_starts_the_launchers_imports_no_torch(ran: Ran) -> None:
    assert ran.told["torch"] is False
