"""`swift sft`, `pt` and `rlhf` as users start them: a plugin, torchrun below it, our command."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from paths import PATCHES
from swift_files import CHANNELS, arguments, make_data, make_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("swift") is None,
    reason="ms-swift is only in the main environment (Python 3.11): `make test` runs this",
)

FOLDER = Path(__file__).parent
PLUGIN = PATCHES / "ms_swift.py"
ATTENTION = FOLDER / "swift_attention_plugin.py"
EXIT = FOLDER / "swift_exit_plugin.py"
SWIFT = Path(sys.executable).with_name("swift")
METRICS = "metrics: [loss, token_acc, tokens, samples, share, tokens_total, samples_total]\n"
# All records, once.
WHOLE = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}

Log = list[dict[str, Any]]


class Ended:
    """What a command printed and logged."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, self.output[-4000:]
        lines = (folder / "logging.jsonl").read_text().splitlines()
        self.log: Log = [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> dict[str, Ended]:
    """All commands, at the same time."""
    base = tmp_path_factory.mktemp("commands")
    model = make_model(base / "model")
    config = base / "metrics.yaml"
    config.write_text(METRICS)
    sft = arguments(model, data["plain"], base / "sft", ddp_backend="gloo", **WHOLE)
    validation = {"val_dataset": [f"{data['plain']}#13"], "eval_strategy": "epoch"}
    given = {"per_device_eval_batch_size": 4, "external_plugins": [str(PLUGIN), str(EXIT)]}
    pt = arguments(model, data["fused"], base / "pt", **WHOLE | {"enable_channel_loss": False})
    packed = {"packing": True, "external_plugins": [str(ATTENTION)], "max_length": 128}
    reference = {"rlhf_type": "dpo", "ref_model": str(make_model(base / "reference", seed=1))}
    dpo = arguments(model, data["pairs"], base / "rlhf", **WHOLE | reference)
    ours = [sys.executable, "-m", "channel_metrics", "run", "--patch", "ms_swift"]
    sampler = base / "sampler.yaml"
    start_weights = ", ".join(f"{name}: 1" for name in CHANNELS)
    sampler.write_text(METRICS + f"sampler: {{start: {{{start_weights}}}, rule: loss}}\n")
    mix = arguments(model, data["plain"], base / "mix", max_steps=4, external_plugins=[str(PLUGIN)])
    started = {
        "mix": start([str(SWIFT), "sft", *options(mix)], base, CHANNEL_METRICS_CONFIG=str(sampler)),
        "sft": start(
            [str(SWIFT), "sft", *options(sft | validation | given)],
            base,
            CHANNEL_METRICS_CONFIG=str(config),
            NPROC_PER_NODE="2",
            MASTER_PORT=str(free_port()),
        ),
        "pt": start(
            [*ours, "--config", str(config), str(SWIFT), "pt", *options(pt | packed)],
            base,
        ),
        "rlhf": start(
            [*ours, "--config", str(config), str(SWIFT), "rlhf", *options(dpo)],
            base,
        ),
    }
    return {name: Ended(process, base / name) for name, process in started.items()}


def options(given: dict[str, Any]) -> list[str]:
    found = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return found


def start(command: list[str], base: Path, **environ: str) -> subprocess.Popen[str]:
    caches = {name: str(base / "cache") for name in ("HF_DATASETS_CACHE", "MODELSCOPE_CACHE")}
    return subprocess.Popen(
        command,
        env={**os.environ, **caches, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def sums(log: Log, metric: str) -> Counter[str]:
    """{channel: the sum over all windows}"""
    found: Counter[str] = Counter()
    for entry in log:
        for name in (*CHANNELS, "unlabeled"):
            found[name] += int(entry.get(f"{name}_{metric}", 0))
    return found


def records(path: Path, field: str, start: int) -> tuple[Counter[str], Counter[str]]:
    """{channel: records} and {channel: bytes of the messages from number `start` on}"""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for record in map(json.loads, path.read_text().splitlines()):
        name = record.get("channel") if field == "channel" else record["metadata"][field]
        counts[name or "unlabeled"] += 1
        messages = record["messages"][start:]
        sizes[name or "unlabeled"] += sum(len(said["content"].encode()) for said in messages)
    return counts, sizes


def check_counts(log: Log, counts: Counter[str], sizes: Counter[str]) -> None:
    """Every record once. Tokens are bytes, and the same few more for each record."""
    samples, tokens = sums(log, "samples"), sums(log, "tokens")
    assert +samples == counts
    (more,) = {(tokens[name] - sizes[name]) / counts[name] for name in counts}
    assert more == int(more) >= 0
    last = [entry for entry in log if "bbu_tokens_total" in entry][-1]
    assert last["bbu_tokens_total"] <= tokens["bbu"]


def test_sft(commands: dict[str, Ended], data: dict[str, Path]) -> None:
    """`--external_plugins`, and torchrun as a child: two ranks, and one that says so."""
    ended = commands["sft"]
    assert "torch.distributed.run --nproc_per_node 2" in ended.output
    assert ended.output.count("channel metrics: patched ms-swift") == 1
    train = [entry for entry in ended.log if "loss" in entry]
    counts, sizes = records(data["plain"], "channel", 1)
    check_counts(train, counts, sizes)
    for entry in train:
        names = [name for name in CHANNELS if f"{name}_loss" in entry]
        assert all(entry[f"loss_{name}"] == entry[f"{name}_loss"] for name in names)
        assert sum(entry[f"{name}_share"] for name in names) == pytest.approx(1, abs=1e-6)
    (evaluated, *_) = [entry for entry in ended.log if "eval_loss" in entry]
    assert sum(evaluated.get(f"eval_{name}_samples", 0) for name in CHANNELS) == 13


def test_sft_with_a_sampler(commands: dict[str, Ended]) -> None:
    """`swift sft` without a script: weights are logged, and they change."""
    train = [entry for entry in commands["mix"].log if "loss" in entry]
    weights = [[entry[f"{name}_weight"] for name in CHANNELS] for entry in train]
    assert weights[0] == [0.25] * 4 and all(sum(w) == pytest.approx(1) for w in weights)
    assert weights[1] != weights[0] and weights[2] != weights[1]
    # Every step has two batches of four records.
    assert sum(sums(train, "samples").values()) == 4 * 8


def test_pt(commands: dict[str, Ended], data: dict[str, Path]) -> None:
    """`channel-metrics run --patch ms_swift swift pt ...`: packs, channels in `metadata`."""
    ended = commands["pt"]
    assert f"--external_plugins {ATTENTION}" in ended.output, "the command line is the user's"
    assert ended.output.count("channel metrics: patched ms-swift") == 1
    train = [entry for entry in ended.log if "loss" in entry]
    check_counts(train, *records(data["fused"], "_fusion_source", 0))
    assert not any(key.startswith("loss_") for entry in train for key in entry)


def test_rlhf(commands: dict[str, Ended], data: dict[str, Path]) -> None:
    """`channel-metrics run --patch ms_swift swift rlhf ...`: DPO, each pair once."""
    ended = commands["rlhf"]
    assert ended.output.count("channel metrics: patched ms-swift") == 1
    train = [entry for entry in ended.log if "loss" in entry]
    counts, _ = records(data["pairs"], "channel", 1)
    assert +sums(train, "samples") == counts
    for entry in train:
        names = [name for name in CHANNELS if f"{name}_loss" in entry]
        for ours, theirs in (("loss", "loss"), ("rewards/margins", "rewards/margins")):
            total = sum(entry[f"{name}_{ours}"] * entry[f"{name}_share"] for name in names)
            assert total == pytest.approx(entry[theirs], rel=1e-4, abs=1e-6)
    assert any(entry["rewards/margins"] for entry in train)
