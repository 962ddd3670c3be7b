"""Packed batches in a loop of one's own: the boundaries decide, in whatever form they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_tools import Record, tiny_model
from loop_tools import RECORDS, check, oracle, shifted_hits, shifted_nll
from torch import Tensor

from channel_metrics import ChannelMetrics


def packed(records: list[Record], kind: str) -> dict[str, Any]:
    """One flat row whose sequences are given in one of three forms."""
    ids = torch.tensor([[i for record in records for i in record["input_ids"]]])
    # The first target of a sequence is left as it is: its own channel has it.
    labels = torch.tensor([[i for record in records for i in record["labels"]]])
    lengths = torch.tensor([len(record["input_ids"]) for record in records])
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None]
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": positions}
    if kind == "cu_seq_lens_q":
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        longest = int(lengths.max())
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        batch |= {"max_length_q": longest, "max_length_k": longest}
        del batch["position_ids"]
    if kind == "4-D mask":
        owner = torch.repeat_interleave(torch.arange(len(records)), lengths)
        batch["attention_mask"] = ((owner[:, None] == owner) & (positions.mT >= positions))[
            None, None
        ]
        del batch["position_ids"]
    return batch


def pack_oracle(logits: Tensor, records: list[Record]) -> dict[str, float]:
    """By tokens, from the logits [1, T, V] of the pack."""
    table, start = {}, 0
    for record in records:
        tokens = []
        for offset, target in enumerate(record["labels"]):
            if target != -100 and start + offset:
                row = logits[0, start + offset - 1].double().log_softmax(-1)
                tokens.append((-row[target].item(), int(row.argmax()) == target))
        table[tuple(record["input_ids"])] = (record["channel"], tokens)
        start += len(record["input_ids"])
    return oracle(table, records)


@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens_q", "4-D mask"])
@pytest.mark.parametrize("way", ["model", "logits", "losses"])
def test_packs(kind: str, way: str) -> None:
    records = [dict(record) for record in RECORDS[:6]]
    # A target at the start of a sequence, predicted from the one before: for its own channel.
    records[3]["labels"] = records[3]["input_ids"]
    model, metrics = tiny_model(attention_dropout=0.0).eval(), ChannelMetrics()
    batch = metrics.collator(lambda _: packed(records, kind))(records)
    with metrics.observe(model, batch) as seen:
        logits = model(**batch).logits
        if way == "logits":
            seen.logits(logits)
        if way == "losses":
            seen.token_losses(
                shifted_nll(logits, batch["labels"]), correct=shifted_hits(logits, batch["labels"])
            )
    check(metrics.close(1).logs, pack_oracle(logits.detach(), records))
