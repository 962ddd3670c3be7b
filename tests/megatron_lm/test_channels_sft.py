"""`--sft` with `--channels`: each conversation of a pack has its own channel."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lm import observe, oracle
from megatron_lm.data import Data
from megatron_lm.launch import Launcher, Run, needs_megatron_training
from megatron_lm.test_channels_layouts import check_against_megatron

pytestmark = needs_megatron_training

METRICS = ("--channels-metrics", "loss", "token_acc", "tokens", "samples", "share")


def sft_samples() -> oracle.Result:
    """What the data set gave for each sample: bounds, mask, and the line it was made from."""
    from megatron.training.datasets import sft_dataset

    seen = []
    get = sft_dataset.SFTDataset.__getitem__

    def remembering(self: Any, index: int) -> Any:
        sample = get(self, index)
        line = int(self.indices[index % len(self.indices)])
        record = self.dataset.dataset[line]
        seen.append(
            {
                "index": index,
                "bounds": sample["cu_seqlens"].tolist(),
                "mask": sample["loss_mask"].tolist(),
                "line": record.get("channel"),
                "messages": [message.get("channel") for message in record["messages"]],
                "roles": [message["role"] for message in record["messages"]],
            }
        )
        return sample

    sft_dataset.SFTDataset.__getitem__ = remembering
    return lambda: seen


def naive_counts(samples: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Tokens and conversations per channel; a token counts for the conversation of its target."""
    found: dict[str, dict[str, int]] = {}
    for sample in samples:
        starts = [i for i, role in enumerate(sample["roles"]) if role == "system"]
        channels = [sample["messages"][i] or sample["line"] for i in starts]
        bounds, length = sample["bounds"], len(sample["mask"])
        owner: list[str] = []
        for channel, start, end in zip(channels, bounds, bounds[1:], strict=False):
            owner += [channel or "unlabeled"] * (end - start)
            if end > start:
                found.setdefault(channel or "unlabeled", {"tokens": 0, "samples": 0})[
                    "samples"
                ] += 1
        for position in range(length - 1):
            if sample["mask"][position]:
                found[owner[position + 1]]["tokens"] += 1
        assert not sample["mask"][length - 1]
    return found


def check_counts(run: Run) -> None:
    """The sums over the run, of all data-parallel ranks, are those of the naive loop."""
    # Context- and tensor-parallel ranks hold the same samples; a data-parallel rank has its own.
    samples = {s["index"]: s for rank in run.ranks for s in rank.seen["sft_samples"]}
    wanted = naive_counts(list(samples.values()))
    assert set(wanted) == {"web", "code", "math"}
    for name, counts in wanted.items():
        for metric, count in counts.items():
            assert sum(run.scalars[f"{name}_{metric}"].values()) == count, (name, metric)


@pytest.mark.parametrize("layout", ["dp1", "dp2", "cp2", "tp2_cp2", "tp2"])
@pytest.mark.parametrize("channel_in", ["message", "line"])
def test_packs(launcher: Launcher, data: Data, layout: str, channel_in: str) -> None:
    args = (*data.sft(channel_in=channel_in, lines=60), "--channels", *METRICS)
    run = launcher.run(layout, *args, patch=True, observe=(sft_samples,))
    check_against_megatron(run)
    check_counts(run)


def test_training_is_unchanged(launcher: Launcher, data: Data) -> None:
    seen = (observe.steps, observe.weights)
    off = launcher.run("tp2_cp2", *data.sft(), observe=seen)
    on = launcher.run("tp2_cp2", *data.sft(), "--channels", patch=True, observe=seen)
    for rank_off, rank_on in zip(off.ranks, on.ranks, strict=True):
        assert rank_off.seen == rank_on.seen


def no_user_warnings() -> oracle.Result:
    """What Megatron's pretrain_gpt.py does on all ranks but the first."""
    warnings.filterwarnings("ignore", category=UserWarning)
    return lambda: None


def test_targets_across_conversations_are_reported_once(launcher: Launcher, data: Data) -> None:
    seen = (no_user_warnings,)
    run = launcher.run("dp1", *data.sft(), "--channels", patch=True, observe=seen)
    assert run.ranks[0].said.count("first token of the next sequence") == 1


def test_a_file_without_channels_is_an_error_at_start(launcher: Launcher, data: Data) -> None:
    args = (*data.sft(channel_in="nowhere"), "--channels")
    run = launcher.run("tp2", *args, patch=True, check=False)
    assert run.ranks[0].code == 1
    assert "no line of the SFT file" in run.ranks[0].err
    assert "looked for channel, dataset_source" in run.ranks[0].err
    assert not run.steps


def test_a_conversation_without_a_channel_is_unlabeled(
    launcher: Launcher, data: Data, tmp_path: Path
) -> None:
    """Fields are configured and dotted; declared names stay in their order."""
    path = tmp_path / "part.jsonl"
    rng = random.Random(1)
    with path.open("w") as file:
        for number in range(60):
            messages = [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "say " + rng.choice("abc")},
                {"role": "assistant", "content": " ".join(rng.choices("abcdef", k=9))},
            ]
            origin = {"name": "web"} if number % 2 else {"name": None}
            file.write(json.dumps({"messages": messages, "origin": origin}) + "\n")
    config = tmp_path / "config.yaml"
    config.write_text("fields: [origin.name]\nmetrics: [loss, tokens, samples]\n")
    given = list(data.sft())
    given[given.index("--data-path") + 1] = str(path)
    run = launcher.run("dp1", *given, "--channels", "--channels-config", str(config), patch=True)
    assert sum(run.scalars["unlabeled_samples"].values()) > 0
    assert sum(run.scalars["web_samples"].values()) > 0
    both = [sum(run.scalars[f"{name}_samples"].values()) for name in ("web", "unlabeled")]
    assert sum(both) == 48


def test_labels_of_further_axes(launcher: Launcher, data: Data, tmp_path: Path) -> None:
    """One axis is read from the field of the channel, so its values are those of the channels."""
    config = tmp_path / "config.yaml"
    kinds = "{web: text, math: text}"
    config.write_text(f"axes: {{again: channel, kind: {kinds}}}\ncross: [[channel, kind]]\n")
    axes = tmp_path / "axes.yaml"
    axes.write_text("other: {code: x}\n")
    given = ("--channels", "--channels-config", str(config), "--channels-axes", str(axes))
    run = launcher.run("tp2_cp2", *data.sft(), *given, *METRICS, patch=True)
    names = ("web", "code", "math")
    for name in names:
        for metric in METRICS[1:]:
            assert run.scalars[f"again/{name}_{metric}"] == run.scalars[f"{name}_{metric}"]
    crossed = {name: "unlabeled" if name == "code" else "text" for name in names}
    for name, kind in crossed.items():
        of_both = run.scalars[f"channel.kind/{name}.{kind}_loss"]
        assert of_both == run.scalars[f"{name}_loss"]
    tokens = [sum(run.scalars[f"{name}_tokens"].values()) for name in ("web", "math", "kind/text")]
    assert tokens[0] + tokens[1] == tokens[2]
    assert run.scalars["other/x_loss"] == run.scalars["code_loss"]


def test_pack_channel_ids_against_a_loop() -> None:
    from channel_metrics.trainers.megatron.data import pack_channel_ids

    rng = random.Random(0)
    for _ in range(50):
        length = rng.randint(4, 40)
        cuts = sorted(rng.sample(range(1, length), rng.randint(0, 3)))
        bounds = [0, *cuts, length]
        ids = [rng.randint(-1, 3) for _ in bounds[1:]]
        mask = torch.tensor([float(rng.random() < 0.7) for _ in range(length)])
        padded = torch.full((length + 1,), length, dtype=torch.int32)
        padded[: len(bounds)] = torch.tensor(bounds, dtype=torch.int32)
        # A line may hold conversations that did not fit any more.
        of_target, owners, crossings = pack_channel_ids([*ids, 9], padded, mask)
        owner = [ids[sum(cut <= t for cut in cuts)] for t in range(length)]
        assert of_target.tolist() == [*owner[1:], owner[-1]]
        assert owners.tolist() == ids
        assert crossings == sum(mask[cut - 1] > 0 for cut in cuts)
