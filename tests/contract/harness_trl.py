"""TRL's SFTTrainer, padded, with the model of the Trainer's harness."""

from __future__ import annotations

from typing import Any

from torch.utils.data import SequentialSampler
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl_tools import CHECKPOINTING

from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.trainers.hf import attach
from contract.harness_hf import HFHarness, Records, tiny_qwen2
from contract.script import Script, flat

__all__ = ["SFTHarness"]


class SFTHarness(HFHarness):
    name = "trl_sft"

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        options = {CHECKPOINTING: False, "bf16": False}
        trainer = SFTInOrder(
            model=tiny_qwen2(),
            args=SFTConfig(
                **arguments,
                **options,
                dataset_kwargs={"skip_prepare_dataset": True},
                max_length=None,
            ),
            train_dataset=Records([s for step in script.steps for s in flat(step)]),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
            processing_class=byte_tokenizer(),
        )
        return attach(trainer, script.config)


class SFTInOrder(SFTTrainer):
    """Takes the records as they come."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)
