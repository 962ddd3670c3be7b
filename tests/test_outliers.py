"""The sequences with the highest and the lowest loss: which they are, and what is written."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from no_sync import NoSync
from operators import operators_of
from session_tools import LOSS_AND_TOKENS, new

from channel_metrics import ChannelError, ConfigError, MetricsConfig, MicroBatch
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.extremes import _MAX_WAITING, Extremes, id_words, text_of_id
from channel_metrics.session import ChannelMetrics


class Letters:
    """A tokenizer: token 0 is `a`."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(97 + token) for token in tokens)


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rank0.jsonl").read_text().splitlines()]


def watching(folder: Path, **outliers: Any) -> ChannelMetrics:
    return new(outliers={"folder": str(folder), "count": 2, **outliers})


def rows(losses: list[float], channels: list[str | None], **more: Any) -> MicroBatch:
    """Rows of three tokens."""
    labels = torch.arange(len(losses)).unsqueeze(1).expand(-1, 3)
    return MicroBatch(
        token_losses=torch.tensor(losses).unsqueeze(1).expand(-1, 3),
        channels=channels,
        labels=labels,
        **more,
    )


def ids(*names: str | None) -> torch.Tensor:
    return torch.tensor([id_words(name) for name in names])


def test_the_highest_and_the_lowest_of_each_channel(tmp_path: Path) -> None:
    metrics = watching(tmp_path)
    metrics.read_tokenizer(Letters())
    losses = [5.0, 1.0, 3.0, 2.0]
    metrics.count(rows(losses, ["a", "a", "b", "a"], record_ids=ids("p", "q", "r", None)))
    metrics.count(rows([4.0, 9.0], ["a", None], record_ids=ids("t", "u")))
    metrics.close(7)
    found = [
        (line["channel"], line["outlier"], line["loss"], line["id"], line["text"])
        for line in written(tmp_path)
    ]
    assert sorted(found) == sorted([
        ("a", "highest", 5.0, "p", "aaa"), ("a", "highest", 4.0, "t", "aaa"),
        ("a", "lowest", 1.0, "q", "bbb"), ("a", "lowest", 2.0, None, "ddd"),
        ("b", "highest", 3.0, "r", "ccc"), ("b", "lowest", 3.0, "r", "ccc"),
        ("unlabeled", "highest", 9.0, "u", "bbb"), ("unlabeled", "lowest", 9.0, "u", "bbb"),
    ])  # fmt: skip
    assert all((line["split"], line["step"], line["tokens"]) == ("train", 7, 3)
               for line in written(tmp_path))  # fmt: skip
    metrics.count(rows([6.0], ["a"]))
    metrics.close(8)
    assert [line["loss"] for line in written(tmp_path)[8:]] == [6.0, 6.0], "each window anew"


def test_many_batches_against_sorting(tmp_path: Path) -> None:
    draw, metrics = random.Random(0), watching(tmp_path, count=3)
    all_of: dict[str, list[float]] = {}
    for number in range(30):
        losses = [round(draw.random(), 4) for _ in range(4)]
        channels = [draw.choice("abc"[: 1 + number // 10]) for _ in losses]
        for loss, channel in zip(losses, channels, strict=True):
            all_of.setdefault(channel, []).append(loss)
        metrics.count(rows(losses, list(channels)))
    metrics.close(1)
    for channel, losses in all_of.items():
        for kind, best in (("highest", sorted(losses)[-3:][::-1]), ("lowest", sorted(losses)[:3])):
            own = [
                line["loss"]
                for line in written(tmp_path)
                if (line["channel"], line["outlier"]) == (channel, kind)
            ]
            assert own == pytest.approx(best)


def test_more_sequences_than_wait_together(tmp_path: Path) -> None:
    draw, metrics = random.Random(1), watching(tmp_path)
    losses = [round(draw.random(), 6) for _ in range(700)]
    for begin in range(0, 700, 7):
        names = [str(number) for number in range(begin, begin + 7)]
        metrics.begin_step()
        metrics.count(rows(losses[begin : begin + 7], ["a"] * 7, record_ids=ids(*names)))
        metrics.end_step()
    metrics.close(1)
    ranked = sorted(range(700), key=losses.__getitem__)
    assert [line["id"] for line in written(tmp_path)] == [
        str(number) for number in (*ranked[:-3:-1], *ranked[:2])
    ]


def test_the_first_one_after_a_comparison(tmp_path: Path) -> None:
    metrics = watching(tmp_path, count=1)
    metrics.count(rows([2.0] * _MAX_WAITING, ["a"] * _MAX_WAITING))
    metrics.count(rows([9.0, 1.0], ["a", "a"], record_ids=ids("p", "q")))
    metrics.close(1)
    assert [(line["loss"], line["id"]) for line in written(tmp_path)] == [(9.0, "p"), (1.0, "q")]


def test_tokens_without_a_finite_loss_are_left_out(tmp_path: Path) -> None:
    metrics = watching(tmp_path)
    losses = torch.tensor([[math.nan, 2.0, 4.0], [math.nan] * 3])
    metrics.count(MicroBatch(token_losses=losses, channels=["a", "a"], record_ids=ids("p", "q")))
    metrics.close(1)
    assert [(line["loss"], line["id"]) for line in written(tmp_path)] == [(3.0, "p")] * 2


class Broken:
    def decode(self, tokens: list[int]) -> str:
        raise OverflowError(f"no token {tokens[0]}")


def test_a_tokenizer_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = watching(tmp_path)
    metrics.read_tokenizer(Broken())
    metrics.count(rows([1.0, 2.0], ["a", "a"]))
    metrics.close(1)
    assert [line["loss"] for line in written(tmp_path)] == [2.0, 1.0, 1.0, 2.0]
    assert caplog.text.count("outliers have no text, as the tokenizer failed: OverflowError") == 1


class Surrogates:
    def decode(self, tokens: list[int]) -> str:
        return "a\ud800"


def test_text_and_ids_that_no_file_can_have(tmp_path: Path) -> None:
    metrics = watching(tmp_path)
    metrics.read_tokenizer(Surrogates())
    metrics.count(rows([1.0, 2.0], ["a", "a"]))
    metrics.close(1)
    assert [line["text"] for line in written(tmp_path)] == ["a?"] * 4
    assert text_of_id(id_words("b\udc80")) == "b?"


def test_steps_that_are_skipped_and_evaluations(tmp_path: Path) -> None:
    metrics = watching(tmp_path)
    for loss, discard in ((1.0, False), (9.0, True)):
        metrics.begin_step()
        metrics.count(rows([loss], ["a"]))
        metrics.end_step(discard=discard)
    with metrics.evaluation("eval", 1):
        metrics.count(rows([5.0], ["a"]))
    metrics.close(1)
    found = [(line["split"], line["outlier"], line["loss"]) for line in written(tmp_path)]
    assert found == [
        ("eval", "highest", 5.0), ("eval", "lowest", 5.0),
        ("train", "highest", 1.0), ("train", "lowest", 1.0),
    ]  # fmt: skip


def test_labels_of_axes_do_not_split_a_channel(tmp_path: Path) -> None:
    metrics = new(axes={"kind": "kind"}, outliers={"folder": str(tmp_path), "count": 1})
    collate = metrics.collator(padded)
    records = [{"ids": [1, 2], "channel": "a", "kind": k, "id": n} for n, k in enumerate("xyx")]
    batch = collate(records)
    assert "channel_record_ids" in batch
    metrics.count(
        MicroBatch(
            token_losses=torch.tensor([[2.0, 2.0], [3.0, 3.0], [1.0, 1.0]]),
            channels=batch["channels"],
            record_ids=batch["channel_record_ids"],
        )
    )
    metrics.close(1)
    found = [(line["channel"], line["outlier"], line["id"]) for line in written(tmp_path)]
    assert found == [("a", "highest", "1"), ("a", "lowest", "2")]


def padded(features: list[Any]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([feature["ids"] for feature in features])}


def test_parts_of_sequences_and_other_units_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = watching(tmp_path)
    metrics.declare_names(["a"])
    for step in (1, 2):
        metrics.count(
            MicroBatch(token_losses=torch.ones(1, 3), channels=torch.zeros(1, 3, dtype=torch.int64))
        )
        metrics.close(step)
    assert caplog.text.count("outliers need whole sequences, but here they are cut") == 1
    assert not (tmp_path / "rank0.jsonl").exists()


def test_record_ids_that_do_not_fit(tmp_path: Path) -> None:
    metrics = watching(tmp_path)
    with pytest.raises(ChannelError, match=r"record_ids must be int64 \[2, 8\], .* \[1, 8\]"):
        metrics.count(rows([1.0, 2.0], ["a", "a"], record_ids=ids("p")))


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    metrics = watching(tmp_path / "taken")
    for step in (1, 2):
        metrics.count(rows([1.0], ["a"]))
        assert metrics.close(step).values
    assert caplog.text.count("outliers cannot be written") == 1


def test_off_is_free(tmp_path: Path) -> None:
    """Without the setting, a micro-batch is no more work than for an accumulator alone."""
    alone = ChannelLossAccumulator(metrics=LOSS_AND_TOKENS)
    off, on = new(), watching(tmp_path)
    batch = rows([1.0, 2.0, 3.0], ["a", "b", None])
    counts = partial(batch.add_to, alone), partial(off.count, batch), partial(on.count, batch)
    wanted, without, found = ([operators_of(count) for _ in range(3)][1:] for count in counts)
    assert without == wanted and len(found[0]) > len(wanted[0]) > 0
    given = [{"ids": [1, 2], "channel": "a", "id": 7}]
    assert "channel_record_ids" not in off.collator(padded)(given)
    assert off.close(1).logs and not list(tmp_path.iterdir())


def test_nothing_is_read_back_between_log_points() -> None:
    acc = ChannelLossAccumulator(["a", "b"], device="meta")
    acc.extremes = Extremes(2, 4)
    for bounds in (torch.tensor([0, 2, 4], dtype=torch.int32, device="meta"), None):
        with NoSync():
            acc.update(
                torch.ones(2, 3, device="meta"),
                channels=torch.zeros(2, dtype=torch.int64, device="meta"),
                cu_seqlens=bounds,
                labels=torch.ones(2, 3, dtype=torch.int64, device="meta"),
                record_ids=ids("p", "q"),
            )
            acc.extremes._compare()
    assert acc.extremes._scores is not None and acc.extremes._scores.shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 3}, "outliers lacks a setting"),
        ({"folder": ""}, "folder of outliers must be a path"),
        ({"folder": "x", "count": 0}, "count of outliers must be a whole number, 1 or more"),
        ({"folder": "x", "text_tokens": -1}, "text_tokens of outliers must be a whole number, 0"),
        ({"folder": "x", "id_field": 3}, "id_field of outliers must be a name"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MetricsConfig(outliers=settings)
