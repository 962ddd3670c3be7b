"""Axolotl's trainer of supervised fine-tuning.

The harness enters at the trainer: it makes one with rows as the plugin leaves them, and a sampler
that takes them in order. What comes before (the plugin, the YAML file, the data) is cut away;
tests/trainers/axolotl run `axolotl train`.
"""

from __future__ import annotations

from typing import Any

from axolotl_tools import AXOLOTL
from torch.utils.data import SequentialSampler

from channel_metrics.trainers.hf import attach
from contract.harness_hf import HFHarness, NamedRecords, Records, collate, tiny_qwen2
from contract.script import Script, flat

__all__ = ["AxolotlHarness"]


class AxolotlHarness(HFHarness):
    """Its runs are forked from the process that runs Axolotl's other tests."""

    name = "axolotl"
    preload = AXOLOTL
    is_here = False

    def records(self, *args: Any) -> Records:
        return NamedRecords(*args)

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        from axolotl.core.trainers.base import AxolotlTrainer
        from axolotl.core.training_args import AxolotlTrainingArguments

        class InOrder(AxolotlTrainer):  # type: ignore[misc]  # Axolotl has no types
            def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
                return SequentialSampler(self.train_dataset)

        trainer = InOrder(
            model=tiny_qwen2(),
            args=AxolotlTrainingArguments(**arguments),
            data_collator=collate,
            eval_data_collator=collate,
            train_dataset=self.records([s for step in script.steps for s in flat(step)]),
        )
        return attach(trainer, script.config)
