"""Loops of one's own, written as a user would, and what their windows must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_case_tools import weights_hash
from hf_tools import (
    VOCABULARY,
    PaddingCollator,
    Record,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
)
from torch import Tensor

from channel_metrics import ChannelMetrics, MetricsConfig

__all__ = [
    "RECORDS",
    "OwnModel",
    "check",
    "logits_loss",
    "model_loss",
    "no_trace",
    "observed",
    "on_and_off",
    "oracle",
    "own_table",
    "plain_oracle",
    "run_loop",
    "shifted_hits",
    "shifted_nll",
    "state_of",
]

RECORDS = make_records(48)


class OwnModel(torch.nn.Module):
    """A causal language model that is none of transformers: it returns logits."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = torch.nn.Embedding(VOCABULARY, 12)
        self.mixing = torch.nn.GRU(12, 12, batch_first=True)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(12, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        mixed, _ = self.mixing(self.embedding(input_ids))
        logits: Tensor = self.head(self.dropout(mixed))
        return logits


def own_table(model: OwnModel, records: Sequence[Record]) -> dict[tuple[int, ...], Any]:
    """As `hf_tools.token_table`: one record at a time, in float64."""
    exact = OwnModel().double().eval()
    exact.load_state_dict(model.state_dict())
    table = {}
    for record in records:
        with torch.no_grad():
            log_probs = exact(torch.tensor([record["input_ids"]]))[0].log_softmax(-1)
        tokens = [
            (
                -log_probs[position - 1][target].item(),
                int(log_probs[position - 1].argmax()) == target,
            )
            for position, target in enumerate(record["labels"])
            if position and target != -100
        ]
        table[tuple(record["input_ids"])] = (record["channel"], tokens)
    return table


def oracle(table: Any, records: Sequence[Record], prefix: str = "") -> dict[str, float]:
    """The default metrics of these records, by counting one token after the other."""
    return expected_metrics(table, [[record["input_ids"] for record in records]], prefix)


def plain_oracle(records: Sequence[Record], prefix: str = "") -> dict[str, float]:
    """`oracle` for a `tiny_model` that is not trained."""
    return oracle(token_table(tiny_model(attention_dropout=0.0), records), records, prefix)


def check(logs: dict[str, float], wanted: dict[str, float]) -> None:
    """The same keys, and equal values."""
    assert set(logs) == set(wanted)
    for key, value in wanted.items():
        assert logs[key] == pytest.approx(value, rel=2e-5), key


@contextmanager
def observed(
    metrics: ChannelMetrics | None, model: torch.nn.Module, batch: Any, **more: Any
) -> Iterator[Any]:
    """`metrics.observe`, or the same loop without metrics."""
    with nullcontext() if metrics is None else metrics.observe(model, batch, **more) as seen:
        yield seen


def run_loop(
    forward: Callable[[Any, torch.nn.Module, dict[str, Tensor]], Tensor],
    model: torch.nn.Module,
    *,
    on: bool,
    called: torch.nn.Module | None = None,
    steps: int = 4,
    rank: int = 0,
    size: int = 1,
    learning_rate: float = 1e-2,
    after: Callable[[ChannelMetrics | None, int], Any] | None = None,
) -> list[dict[str, float]]:
    """A loop of two micro-batches of two records per step and rank; a window for each two steps.

    Args:
        forward: forward(metrics or None, called, batch) returns the loss.
        model: gives the parameters.
        on: whether there are metrics.
        called: the model as the loop calls it.
        steps, rank, size, learning_rate: of the run.
        after: after(metrics or None, step), at the end of each step.
    """
    metrics = ChannelMetrics(MetricsConfig()) if on else None
    collate = PaddingCollator() if metrics is None else metrics.collator(PaddingCollator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    logs = []
    mine = iter(RECORDS[rank::size])
    for step in range(1, steps + 1):
        for _ in range(2):
            batch = collate([next(mine), next(mine)])
            (forward(metrics, model if called is None else called, batch) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(metrics, step)
        if metrics is not None and step % 2 == 0:
            logs.append(metrics.close(step).logs)
    return logs


def state_of(model: torch.nn.Module) -> list[Any]:
    """The weights and the state of the random numbers, for comparisons bit for bit."""
    parameters = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    return [*(p.detach().flatten().tolist() for p in parameters), torch.get_rng_state().tolist()]


def model_loss(metrics: Any, model: torch.nn.Module, batch: Any) -> Tensor:
    """The loss of a transformers model."""
    with observed(metrics, model, batch):
        loss: Tensor = model(**batch).loss
    return loss


def logits_loss(metrics: Any, model: torch.nn.Module, batch: Any) -> Tensor:
    """A loss that the loop computes from the logits of any model."""
    with observed(metrics, model, batch) as seen:
        found = model(batch["input_ids"])
        logits = getattr(found, "logits", found)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        if seen is not None:
            seen.logits(logits)
    return loss


def no_trace(run: Callable[[bool], tuple[Any, torch.nn.Module]]) -> Any:
    """Run without and with metrics; the training must be the same bit for bit.

    Args:
        run: run(on) returns its logs and the trained model.

    Returns:
        The logs of the run with metrics.
    """
    torch.manual_seed(7)
    _, without = run(False)
    wanted = state_of(without)
    torch.manual_seed(7)
    logs, with_metrics = run(True)
    assert state_of(with_metrics) == wanted
    return logs


def shifted_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, S - 1]: the loss of each target that a causal model predicts."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def shifted_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, S - 1]: whether each target was predicted."""
    return logits[:, :-1].argmax(-1) == labels[:, 1:]


def on_and_off(run: Any) -> dict[str, Any]:
    """Windows of a run with metrics, and the weights of a run with them and of one without."""
    torch.manual_seed(7)
    _, off = run(False)
    torch.manual_seed(7)
    logs, on = run(True)
    return {"logs": logs, "on": weights_hash(on), "off": weights_hash(off)}
