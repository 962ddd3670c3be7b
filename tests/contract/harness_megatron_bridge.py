"""The session and the events of Megatron-Bridge, with losses that are made up.

The harness enters at `BridgeRun`: its loop fires the events of Bridge's own `CallbackManager` as
`train` and `evaluate` of Bridge do, and runs a schedule of megatron-core. What comes before (the
patch, `pretrain`, the datasets, the model) is cut away; tests/megatron_bridge run `pretrain`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron_bridge.launch import BRIDGE

from contract.harness import watch_windows
from contract.harness_megatron import (
    MegatronHarness,
    labels_of,
    loss_func,
    made_up_model,
    tensors,
)
from contract.labels import name_of
from contract.script import Ran, Script, Step

__all__ = ["MegatronBridgeHarness"]


class MegatronBridgeHarness(MegatronHarness):
    """An evaluation that dies ends the training of Bridge, so "fails" is not in `can`."""

    name = "megatron_bridge"
    can = frozenset({"rerun", "skip", "ranks", "lies", "save"})
    preload = BRIDGE

    def train(self, script: Script, folder: Path, ran: Ran) -> None:
        Loop(script, folder, ran).train()


class Loop:
    """The training of one rank."""

    def __init__(self, script: Script, folder: Path, ran: Ran) -> None:
        from megatron.bridge.training.callbacks import CallbackManager

        from channel_metrics.trainers.megatron_bridge.run import BridgeRun

        self.script, self.ran, self.model = script, ran, made_up_model()
        load = str(script.resume.parent) if script.resume else None
        bridge = SimpleNamespace(
            model=SimpleNamespace(),
            checkpoint=SimpleNamespace(load=load, save=str(folder)),
            logger=SimpleNamespace(log_interval=script.every),
        )
        self.run = BridgeRun(bridge, script.config)
        watch_windows(self.run.session, ran)
        self.manager = CallbackManager()
        for event in ("on_train_start", "on_train_step_end", "on_eval_start", "on_eval_end"):
            self.manager.register(event, getattr(self.run, event))
        step = int(script.resume.name.split("_")[1]) if script.resume else 0
        self.state = SimpleNamespace(
            train_state=SimpleNamespace(step=step),
            tensorboard_logger=None,
            wandb_logger=self,
            comet_logger=None,
            mlflow_logger=None,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """As a run of W&B, but on all ranks."""
        is_train = not any(key.startswith("eval_") for key in values)
        (self.ran.logs if is_train else self.ran.evaluations).append(dict(values))

    def fire(self, event: str, **more: Any) -> None:
        self.manager.fire(event, SimpleNamespace(state=self.state, **more))

    def train(self) -> None:
        script, state = self.script, self.state.train_state
        self.fire("on_train_start")
        for number in range(state.step + 1, len(script.steps) + 1):
            for _ in range(1 + (number in script.reruns)):
                self.through_the_schedule(script.steps[number - 1], forward_only=False)
            self.ran.steps += 1
            self.fire("on_train_step_end", skipped_iter=number in script.skips)
            state.step = number
            for evaluation in script.evaluations:
                if evaluation.after == number:
                    self.fire("on_eval_start")
                    with torch.no_grad():
                        self.through_the_schedule(evaluation.batches, forward_only=True)
                    self.fire("on_eval_end")
            if script.save_at == number:
                self.run.save(self.state)
                save = Path(self.run.bridge.checkpoint.save)
                self.ran.checkpoint = save / f"iter_{number:07d}"

    def through_the_schedule(self, step: Step, *, forward_only: bool) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from channel_metrics.trainers.megatron.step import counting_schedule

        mine = step[dist.get_rank() :: dist.get_world_size()]
        counting_schedule(get_forward_backward_func(), self.run.metrics)(
            forward_step_func=self.forward_step,
            data_iterator=map(as_batch, mine),
            model=[self.model],
            num_microbatches=len(mine),
            seq_length=max(s.tokens for batch in mine for s in batch),
            micro_batch_size=len(mine[0]),
            forward_only=forward_only,
        )

    def forward_step(self, data_iterator: Any, model: Any) -> Any:
        batch = next(data_iterator)
        lie = 1.5 if self.script.lies and torch.is_grad_enabled() else 1.0
        return model(batch["losses"]), partial(loss_func, batch["loss_mask"], lie)


def as_batch(sequences: Any) -> dict[str, Any]:
    """What a data loader of Bridge gives for rows with names."""
    losses, mask = tensors(sequences)
    names = [name_of(sequence) for sequence in sequences]
    labels = labels_of(sequences)
    return {"losses": losses, "loss_mask": mask, "labels": labels, "channels": names}
