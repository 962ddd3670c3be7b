"""A loop of one's own over megatron-core's schedules, in processes that a server forks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_tools import MEGATRON

from contract.harness import Forking, watch_windows
from contract.labels import name_of
from contract.script import Batch, Evaluation, OneSequence, Ran, Script, Step

__all__ = ["MegatronHarness"]


class MegatronHarness(Forking):
    """Losses are made up: token t of sequence n has (n + t) % 7 + 0.5.

    A schedule takes them through a model.
    """

    name = "megatron"
    can = frozenset({"rerun", "skip", "peek", "ranks", "lies", "save", "fails"})
    reserved = "z"
    preload = MEGATRON
    is_here = False

    def run_here(self, script: Script, folder: Path) -> Ran:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel()
        ran = super().run_here(script, folder)
        # Nobody leaves while another one still talks to it.
        dist.barrier()
        return ran

    def train(self, script: Script, folder: Path, ran: Ran) -> None:
        Loop(script, folder, ran).train()

    def nll(self, sequence: OneSequence) -> float:
        return sum(losses_of(sequence))

    def losses(self, sequence: OneSequence) -> list[float]:
        return losses_of(sequence)

    def tokens(self, sequence: OneSequence) -> list[int]:
        return ids_of(sequence)


class Loop:
    """The training of one rank."""

    def __init__(self, script: Script, folder: Path, ran: Ran) -> None:
        from channel_metrics import ChannelMetrics
        from channel_metrics.trainers.megatron import MegatronChannelMetrics
        from channel_metrics.trainers.megatron.reserved import megatron_keys

        self.script, self.folder, self.ran = script, folder, ran
        self.session = ChannelMetrics(script.config, reserved=megatron_keys())
        self.metrics = MegatronChannelMetrics(session=self.session)
        self.model = made_up_model()
        self.fails = False

    def train(self) -> None:
        script, session, ran = self.script, self.session, self.ran
        watch_windows(session, ran)
        session.start(script.resume)
        first = int(script.resume.name.split("-")[1]) if script.resume else 0
        for number in range(first + 1, len(script.steps) + 1):
            for _ in range(1 + (number in script.reruns)):
                self.metrics.begin_step()
                self.through_the_schedule(script.steps[number - 1], forward_only=False)
            self.metrics.end_step(discard=number in script.skips)
            ran.steps += 1
            self.after(number)

    def after(self, number: int) -> None:
        script, session, ran = self.script, self.session, self.ran
        if number in script.peeks:
            ran.peeked.append(self.metrics.compute(number, reset=False))
        if number % script.every == 0:
            ran.logs.append(self.metrics.compute(number))
        for evaluation in script.evaluations:
            if evaluation.after == number:
                self.evaluate(evaluation, number)
        if script.save_at == number:
            ran.checkpoint = self.folder / f"checkpoint-{number}"
            session.save(ran.checkpoint, is_writer=dist.get_rank() == 0)

    def evaluate(self, evaluation: Evaluation, number: int) -> None:
        self.fails = evaluation.fails
        try:
            with self.session.evaluation("eval", number) as found, torch.no_grad():
                self.through_the_schedule(evaluation.batches, forward_only=True)
        except RuntimeError:
            return
        finally:
            self.fails = False
        self.ran.evaluations.append(found.logs)

    def through_the_schedule(self, step: Step, *, forward_only: bool) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        mine = step[dist.get_rank() :: dist.get_world_size()]
        get_forward_backward_func()(
            forward_step_func=self.forward_step,
            data_iterator=iter(mine),
            model=[self.model],
            num_microbatches=len(mine),
            seq_length=max(s.tokens for batch in mine for s in batch),
            micro_batch_size=len(mine[0]),
            forward_only=forward_only,
        )
        if self.fails:
            raise RuntimeError("an evaluation that fails")

    def forward_step(self, data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        losses, mask = tensors(batch)
        lie = 1.5 if self.script.lies and torch.is_grad_enabled() else 1.0
        counted = self.metrics.count(
            partial(loss_func, mask, lie),
            channels=[name_of(sequence) for sequence in batch],
            loss_mask=mask,
            labels=labels_of(batch),
        )
        return model(losses), counted


def made_up_model() -> Any:
    """Gives back the losses that it is given."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer import TransformerConfig

    class Model(torch.nn.Module):
        model_type = ModelType.encoder_or_decoder

        def __init__(self) -> None:
            super().__init__()
            self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
            self.nothing = torch.nn.Parameter(torch.zeros(()))

        def set_input_tensor(self, _: Any) -> None:
            """The schedules call it; only pipeline stages behind the first have an input."""

        def forward(self, losses: torch.Tensor) -> torch.Tensor:
            return losses + self.nothing

    return Model()


def ids_of(sequence: OneSequence) -> list[int]:
    return [(sequence.number + t) % 7 for t in range(sequence.tokens)]


def labels_of(batch: Batch) -> torch.Tensor:
    """The ids of the tokens, padded on the right."""
    rows = [ids_of(sequence) for sequence in batch]
    width = max(map(len, rows))
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows])


def losses_of(sequence: OneSequence) -> list[float]:
    return [token + 0.5 for token in ids_of(sequence)]


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and mask [B, S], padded on the right."""
    rows = [losses_of(sequence) for sequence in batch]
    width = max(map(len, rows))
    losses = torch.tensor([row + [0.0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
    return losses, mask


def loss_func(mask: torch.Tensor, lie: float, losses: torch.Tensor) -> Any:
    total, tokens = (losses * mask).sum(), mask.sum().int()
    return total, tokens, {"lm loss": torch.stack([lie * total.detach(), tokens.float()])}
