"""A loop of one's own around `ChannelMetrics`, as docs/own_loop.md has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from channel_metrics import ChannelMetrics, evaluate
from contract.harness import Forking, watch_windows
from contract.harness_hf import Records, collate, nll_of, nlls_of, tiny_qwen2, token_ids
from contract.script import ROWS, Evaluation, OneSequence, Ran, Script, Step, flat

__all__ = ["LoopHarness"]


class LoopHarness(Forking):
    """The tiny Qwen2 of the Trainer's harness; its optimizer leaves it as it is."""

    name = "loop"
    can = frozenset({"rerun", "skip", "peek", "ranks", "save", "fails", "columns", "ids"})
    reserved = "their"

    def train(self, script: Script, folder: Path, ran: Ran) -> None:
        Loop(script, folder, ran).train()

    def nll(self, sequence: OneSequence) -> float:
        return nll_of(sequence)

    def losses(self, sequence: OneSequence) -> list[float]:
        return nlls_of(sequence)

    def tokens(self, sequence: OneSequence) -> list[int]:
        return token_ids(sequence)[1:]


class Loop:
    """The training of one rank."""

    def __init__(self, script: Script, folder: Path, ran: Ran) -> None:
        self.script, self.folder, self.ran = script, folder, ran
        self.metrics = ChannelMetrics(script.config, reserved=["their_loss"])
        self.collate = self.metrics.collator(collate)
        self.model = tiny_qwen2()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def train(self) -> None:
        script, metrics = self.script, self.metrics
        watch_windows(metrics, self.ran)
        metrics.start(script.resume)
        first = int(script.resume.name.split("-")[1]) if script.resume else 0
        for number in range(first + 1, len(script.steps) + 1):
            for _ in range(1 + (number in script.reruns)):
                metrics.begin_step()
                for batch in self.loader(script.steps[number - 1]):
                    with metrics.observe(self.model, batch):
                        loss = self.model(**batch).loss
                    loss.backward()
            metrics.end_step(discard=number in script.skips)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ran.steps += 1
            self.after(number)

    def loader(self, step: Step, fails_at: int | None = None) -> Any:
        """The batches of this rank."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        records = Records(flat(step[rank::size]), fails_at)
        return DataLoader(records, ROWS, collate_fn=self.collate)

    def after(self, number: int) -> None:
        script, metrics, ran = self.script, self.metrics, self.ran
        if number in script.peeks:
            ran.peeked.append(metrics.peek(number).logs)
        if number % script.every == 0:
            ran.logs.append({})
            metrics.write(metrics.close(number), ran.logs[-1])
        for evaluation in script.evaluations:
            if evaluation.after == number:
                self.evaluate(evaluation, number)
        if script.save_at == number:
            ran.checkpoint = self.folder / f"checkpoint-{number}"
            metrics.save(ran.checkpoint, is_writer=metrics.ranks.rank == 0)

    def evaluate(self, evaluation: Evaluation, number: int) -> None:
        loader = self.loader(evaluation.batches, ROWS if evaluation.fails else None)
        try:
            found = evaluate(self.metrics, self.model, loader, step=number)
        except RuntimeError:
            assert evaluation.fails
            return
        self.ran.evaluations.append(found)
