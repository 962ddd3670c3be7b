"""ms-swift's Megatron trainer: its own steps, evaluations and logs, around a made-up model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from swift_megatron_launch import SWIFT_MEGATRON

from contract.harness import watch_windows
from contract.harness_megatron import MegatronHarness
from contract.labels import name_of
from contract.script import Batch, Evaluation, Ran, Script

__all__ = ["SwiftMegatronHarness"]


class SwiftMegatronHarness(MegatronHarness):
    """What ms-swift does with models, data and files of checkpoints is left out."""

    name = "swift_megatron"
    can = frozenset({"ranks", "lies", "save", "fails"})
    preload = SWIFT_MEGATRON

    def train(self, script: Script, folder: Path, ran: Ran) -> None:
        from channel_metrics.trainers.swift_megatron import attach

        trainer = new_trainer(script, folder, ran)
        attach(trainer, script.config)
        watch_windows(trainer.channel_metrics, ran)
        batches, _ = trainer.setup_training(None, None)
        for number in range(trainer.state.iteration + 1, len(script.steps) + 1):
            trainer.run_train_step(batches, None)
            ran.steps += 1
            for evaluation in script.evaluations:
                if evaluation.after == number:
                    evaluate(trainer, evaluation)


def evaluate(trainer: Any, evaluation: Evaluation) -> None:
    mine = evaluation.batches[dist.get_rank() :: dist.get_world_size()]
    per_step = trainer.args.num_microbatches
    trainer.args.num_microbatches, trainer.args.eval_iters = 1, len(mine)
    try:
        trainer.evaluate(batches_of(mine, fails=evaluation.fails))
    except RuntimeError:
        assert evaluation.fails
    trainer.args.num_microbatches = per_step
    trainer.wrapped_models[0].train()


def batches_of(batches: Any, *, fails: bool = False) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield as_swift_has_it(batch)
        if fails:
            raise RuntimeError("an evaluation that fails")


def as_swift_has_it(batch: Batch) -> dict[str, Any]:
    """Labels tell the loss, see `Model`; the first token of a row is no target."""
    width = max(sequence.tokens for sequence in batch) + 1
    labels = torch.full((len(batch), width), -100)
    for row, sequence in enumerate(batch):
        for t in range(sequence.tokens):
            labels[row, t + 1] = (sequence.number + t) % 7
    channels = [name_of(sequence) for sequence in batch]
    return {"input_ids": labels.clamp(min=0), "labels": labels, "channel": channels}


def new_trainer(script: Script, folder: Path, ran: Ran) -> Any:
    """A trainer of ms-swift without what its constructor makes of a model on the disk."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer import TransformerConfig
    from swift.megatron.trainers.trainer import MegatronTrainer

    class Model(torch.nn.Module):
        """The loss of a token is its label and a half."""

        model_type = ModelType.encoder_or_decoder
        vp_stage = None

        def __init__(self) -> None:
            super().__init__()
            self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
            self.nothing = torch.nn.Parameter(torch.zeros(()))

        def set_input_tensor(self, _: Any) -> None: ...

        def zero_grad_buffer(self) -> None:
            """As the wrapper of Megatron's data parallelism."""

        def forward(self, labels: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.where(labels < 0, 0.0, labels + 0.5) + self.nothing

    class Trainer(MegatronTrainer):  # type: ignore[misc]  # ms-swift has no types
        def __init__(self) -> None:
            first = int(script.resume.name.split("-")[1]) if script.resume else 0
            self.args = arguments(script, folder)
            self.state = SimpleNamespace(
                iteration=first, should_log=False, should_eval=False, should_save=False
            )
            self.unwrapped_models = self.wrapped_models = [Model()]
            self.config = self.wrapped_models[0].config
            self.optimizer = Optimizer()
            self.opt_param_scheduler = SimpleNamespace(step=lambda increment: None)
            self.enable_routing_replay = False
            self.eval_metrics = None

        def setup_model_training(self) -> None:
            self._start_iteration = self.state.iteration
            self._train_metrics: dict[str, Any] = {}
            self._pre_hook_enabled = False

        def _prepare_data_iterator(self, *_: Any) -> Any:
            left = [b for step in script.steps[self.state.iteration :] for b in step]
            return batches_of(left[dist.get_rank() :: dist.get_world_size()]), None

        def loss_func(self, *args: Any, **kwargs: Any) -> Any:
            loss, tokens, report = super().loss_func(*args, **kwargs)
            if script.lies:
                report["loss"][0] *= 1.5
            return loss, tokens, report

        def call_event(self, event: str, **kwargs: Any) -> None:
            state = self.state
            if event == "on_step_end":
                state.should_log = state.iteration % script.every == 0
                state.should_save = state.iteration == script.save_at
            elif event == "on_log":
                is_evaluation = "eval_loss" in kwargs["logs"]
                (ran.evaluations if is_evaluation else ran.logs).append(kwargs["logs"])

        def save_checkpoint(self) -> None:
            ran.checkpoint = folder / f"checkpoint-{self.state.iteration}"
            self.state.last_model_checkpoint = str(ran.checkpoint)

    return Trainer()


class Optimizer:
    """It leaves the weights as they are."""

    param_groups = ({"params": [None], "lr": 0.0},)

    def zero_grad(self) -> None: ...

    def step(self) -> tuple[bool, float, None]:
        return True, 0.0, None


def arguments(script: Script, folder: Path) -> SimpleNamespace:
    mine = len(script.steps[0]) // dist.get_world_size()
    return SimpleNamespace(
        task_type="causal_lm",
        padding_free=False,
        enable_dft_loss=False,
        enable_channel_loss=False,
        context_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        num_microbatches=mine,
        micro_batch_size=len(script.steps[0][0]),
        global_batch_size=mine,
        train_iters=len(script.steps),
        seq_length=8,
        eval_iters=0,
        mtp_num_layers=None,
        dsa_indexer_loss_coeff=None,
        metric_for_best_model=None,
        use_distributed_optimizer=False,
        overlap_param_gather=False,
        async_save=False,
        adapters=[],
        tuner_type="full",
        model=None,
        mcore_adapter=None,
        mcore_model=script.resume,
        output_dir=str(folder),
    )
