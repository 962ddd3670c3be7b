"""gpt_sft of Megatron-Bridge: packs of conversations, and a row per record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from megatron_lm.data import Data
from megatron_lm.launch import Run

from megatron_bridge import observe, sft
from megatron_bridge.launch import BridgeLauncher, needs_megatron_bridge

pytestmark = needs_megatron_bridge

SEEN = (observe.sft_tokens, observe.training)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sft.write(tmp_path_factory.mktemp("sft") / "records")


def settings(data: Data, root: str, *, packs: bool, **dataset: Any) -> dict[str, dict[str, Any]]:
    # Bridge packs into rows of one, and two context-parallel ranks cut each text into four.
    return {
        "dataset": {
            "dataset_root": root,
            "do_test": False,
            **({"packs": 64, "mult": 4} if packs else {}),
            **dataset,
        },
        "tokenizer": {
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": data.tokenizer(),
            "vocab_size": None,
        },
        "train": {"micro_batch_size": 1 if packs else 2},
    }


def train_logs(run: Run) -> list[dict[str, dict[str, float]]]:
    """Per iteration: {channel: {metric: value}}."""
    steps: dict[int, dict[str, dict[str, float]]] = {}
    for channel in (*sft.LETTERS, "unlabeled"):
        for metric in ("tokens", "loss"):
            for step, value in run.scalars.get(f"{channel}_{metric}", {}).items():
                steps.setdefault(step, {}).setdefault(channel, {})[metric] = value
    return [steps[step] for step in sorted(steps)]


def check(run: Run) -> None:
    """The logs are what a loop over the tokens finds."""
    logs, seen = train_logs(run), [rank.seen["sft_tokens"] for rank in run.ranks]
    assert len(logs) == 6
    assert {channel for log in logs for channel in log} == {"web", "code", "unlabeled"}
    for number, log in enumerate(logs):
        size = len(seen[0]) // 6
        micro_batches = [m for rank in seen for m in rank[number * size : (number + 1) * size]]
        wanted = sft.expected(micro_batches)
        assert set(log) == set(wanted)
        for channel, values in wanted.items():
            assert log[channel] == pytest.approx(values, rel=1e-5), channel
    assert "do not add up" not in "".join(rank.said for rank in run.ranks)


@pytest.mark.parametrize("layout", ["dp1", "dp2"])
@pytest.mark.parametrize("packs", [True, False])
def test_each_conversation_has_its_channel(
    launcher: BridgeLauncher, data: Data, root: str, layout: str, packs: bool
) -> None:
    axes = "axes: {again: channel, kind: {web: text}}\n"
    run = launcher.train(layout, settings(data, root, packs=packs), observe=SEEN, config=axes)
    check(run)
    for metric in ("loss", "tokens"):
        for name in ("web", "code", "unlabeled"):
            assert run.scalars[f"again/{name}_{metric}"] == run.scalars[f"{name}_{metric}"]
        assert run.scalars[f"kind/text_{metric}"] == run.scalars[f"web_{metric}"]
    assert {key for key in run.scalars if key.startswith("eval_web")} >= {"eval_web_loss"}


def test_packs_that_context_parallelism_cuts(
    launcher: BridgeLauncher, data: Data, root: str
) -> None:
    # Bridge insists on it for context parallelism.
    per_token = {**settings(data, root, packs=True), "model": {"calculate_per_token_loss": True}}
    alone, cut = (launcher.train(layout, per_token, observe=SEEN) for layout in ("dp1", "cp2"))
    for log, wanted in zip(train_logs(cut), train_logs(alone), strict=True):
        for channel, values in wanted.items():
            assert log[channel] == pytest.approx(values, rel=1e-5), channel
    assert "do not add up" not in "".join(rank.said for rank in cut.ranks)


@pytest.mark.parametrize("packs", [True, False])
def test_training_is_unchanged(
    launcher: BridgeLauncher, data: Data, tmp_path: Path, root: str, packs: bool
) -> None:
    """Bit by bit, also where the packs are prepared."""
    plain = sft.write(tmp_path / "records")
    off = launcher.train("dp1", settings(data, plain, packs=packs), on=False, observe=SEEN)
    on = launcher.train("dp1", settings(data, root, packs=packs), observe=SEEN)
    assert off.ranks[0].seen == on.ranks[0].seen
    assert len(on.ranks[0].seen["training"]["losses"]) == 6


def test_packs_without_channels_are_refused(
    launcher: BridgeLauncher, data: Data, tmp_path: Path
) -> None:
    plain = sft.write(tmp_path / "records")
    launcher.train("dp1", settings(data, plain, packs=True), on=False)
    run = launcher.train("dp1", settings(data, plain, packs=True), check=False)
    assert "ConfigError" in run.failure and "name no channels" in run.failure
    files = list(Path(plain).rglob("*.parquet"))
    for file in files:
        file.unlink()
    # Another run for the launcher, and the same for the packs.
    settings_again = settings(data, plain, packs=True, memmap_workers=2)
    again = launcher.train("dp1", settings_again)
    assert again.scalars["web_tokens"]
    for file in files:
        column = pyarrow.parquet.read_table(file)["channels"].combine_chunks()
        assert set(column.flatten().to_pylist()) == {"web", "code", None}


def test_records_without_channels_are_said_once(
    launcher: BridgeLauncher, data: Data, tmp_path: Path
) -> None:
    plain = sft.write(tmp_path / "records", channels=False)
    run = launcher.train("dp1", settings(data, plain, packs=False))
    for split in ("train", "eval"):
        assert run.ranks[0].said.count(f"no record of this {split} window had a channel") == 1
    packed = launcher.train("dp1", settings(data, plain, packs=True), check=False)
    assert "ConfigError" in packed.failure and "name no channels" in packed.failure
