"""A loop of one's own around `ChannelMetrics`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from channel_metrics import ChannelMetrics, MicroBatch
from channel_metrics.ranks.ranks import Ranks
from contract.harness import Forking
from contract.labels import name_of
from contract.script import Batch, OneSequence, Ran, Script

__all__ = ["LoopHarness", "ids_of", "labels_of", "losses_of", "watch_windows"]


class LoopHarness(Forking):
    """Losses are made up: token t of sequence n has (n + t) % 7 + 0.5."""

    name = "loop"
    first = 0
    can = frozenset({"rerun", "skip", "peek", "ranks", "lies", "save", "fails"})
    reserved = "their"

    def train(self, script: Script, folder: Path, ran: Ran) -> None:
        metrics = ChannelMetrics(script.config, reserved=["their_loss"])
        watch_windows(metrics, ran)
        metrics.start(script.resume)
        first = int(script.resume.name.split("-")[1]) if script.resume else 0
        for number in range(first + 1, len(script.steps) + 1):
            for _ in range(1 + (number in script.reruns)):
                metrics.begin_step()
                for batch in _mine(script.steps[number - 1]):
                    _count(metrics, batch, script.lies)
            metrics.end_step(discard=number in script.skips)
            ran.steps += 1
            if number in script.peeks:
                ran.peeked.append(metrics.peek(number).logs)
            if number % script.every == 0:
                ran.logs.append({})
                metrics.write(metrics.close(number), ran.logs[-1])
            for evaluation in script.evaluations:
                if evaluation.after == number:
                    _evaluate(metrics, evaluation, number, ran)
            if script.save_at == number:
                ran.checkpoint = folder / f"checkpoint-{number}"
                metrics.save(ran.checkpoint, is_writer=metrics.ranks.rank == 0)

    def nll(self, sequence: OneSequence) -> float:
        return sum(losses_of(sequence))

    def losses(self, sequence: OneSequence) -> list[float]:
        return losses_of(sequence)

    def tokens(self, sequence: OneSequence) -> list[int]:
        return ids_of(sequence)


def ids_of(sequence: OneSequence) -> list[int]:
    return [(sequence.number + t) % 7 for t in range(sequence.tokens)]


def labels_of(batch: Batch) -> torch.Tensor:
    """The ids of the tokens, padded on the right."""
    rows = [ids_of(sequence) for sequence in batch]
    width = max(map(len, rows))
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows])


def losses_of(sequence: OneSequence) -> list[float]:
    return [token + 0.5 for token in ids_of(sequence)]


def _evaluate(metrics: ChannelMetrics, evaluation: Any, number: int, ran: Ran) -> None:
    try:
        with metrics.evaluation("eval", number) as found:
            for batch in _mine(evaluation.batches):
                _count(metrics, batch, False)
                if evaluation.fails:
                    raise RuntimeError("an evaluation that fails")
    except RuntimeError:
        return
    ran.evaluations.append(found.logs)


def _mine(batches: Any) -> list[Batch]:
    """The micro-batches of this rank."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return list(batches[rank::size])


def _count(metrics: ChannelMetrics, batch: Batch, lies: bool) -> None:
    rows = [losses_of(sequence) for sequence in batch]
    width = max(map(len, rows))
    losses = torch.tensor([row + [0.0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    metrics.count(
        MicroBatch(
            token_losses=losses,
            channels=[name_of(sequence) for sequence in batch],
            loss_mask=mask,
            labels=labels_of(batch),
            reported_sum=losses.sum() * (1.5 if lies else 1.0),
        )
    )


def watch_windows(metrics: ChannelMetrics, ran: Ran) -> None:
    """Keep the windows of a session, and how many all-reduces of ours came before each."""
    calls = [0]
    all_reduce = Ranks.all_reduce

    class Counted(Ranks):
        def all_reduce(self, values: Any) -> Any:
            calls[0] += 1
            return all_reduce(self, values)

    ranks = metrics.ranks
    metrics.ranks = Counted(ranks.group, ranks.device, ranks.alone)

    def keep(window: Any) -> None:
        ran.windows.append(window)
        ran.collectives.append(calls[0])
        calls[0] = 0

    metrics.on_window.append(keep)
