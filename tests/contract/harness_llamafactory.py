"""LLaMA-Factory's trainer of stage sft.

The harness enters at the trainer: it makes one with rows as the patched data loader leaves them,
and a sampler that takes them in order. What comes before (the patch, the YAML file, the data
loader) is cut away; tests/trainers/llamafactory run `llamafactory-cli train`.
"""

from __future__ import annotations

from typing import Any

from fork_client import Preload
from llamafactory_tools import STUBS
from torch.utils.data import SequentialSampler

from channel_metrics.trainers.hf import attach
from contract.harness_hf import HFHarness, NamedRecords, Records, collate, tiny_qwen2
from contract.script import Script, flat

__all__ = ["LlamaFactoryHarness"]


class LlamaFactoryHarness(HFHarness):
    """Its runs are forked from a process that finds the stub of torchaudio."""

    name = "llamafactory"
    preload = Preload(("llamafactory.train.sft.trainer",), first=(str(STUBS),))
    is_here = False

    def records(self, *args: Any) -> Records:
        return NamedRecords(*args)

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        from llamafactory.hparams import FinetuningArguments, TrainingArguments
        from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

        class InOrder(CustomSeq2SeqTrainer):  # type: ignore[misc]  # LLaMA-Factory has no types
            def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
                return SequentialSampler(self.train_dataset)

        trainer = InOrder(
            model=tiny_qwen2(),
            args=TrainingArguments(**arguments),
            finetuning_args=FinetuningArguments(),
            processor=None,
            tokenizer=None,
            data_collator=collate,
            train_dataset=self.records([s for step in script.steps for s in flat(step)]),
        )
        return attach(trainer, script.config)
