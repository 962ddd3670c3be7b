"""TRL's SFTTrainer, padded, and DPOTrainer, with the model of the Trainer's harness."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl_tools import CHECKPOINTING

from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.trainers.hf import attach
from contract.harness_hf import HFHarness, InOrder, Records, tiny_qwen2
from contract.pairs import BETA, REFERENCE_SEED, loss_of_pair, pair_of
from contract.script import OneSequence, Script, flat

__all__ = ["DPOHarness", "SFTHarness"]

OPTIONS: dict[str, Any] = {CHECKPOINTING: False, "bf16": False}


class SFTHarness(HFHarness):
    name = "trl_sft"

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Rows(sequences, fails_at)

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        records = self.records([s for step in script.steps for s in flat(step)])
        unprepared: dict[str, Any] = {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
        }
        trainer = SFTInOrder(
            model=tiny_qwen2(),
            args=SFTConfig(**arguments, **OPTIONS, **unprepared),
            train_dataset=stand_in(records),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
            processing_class=byte_tokenizer(),
        )
        trainer.train_dataset = records
        return attach(trainer, script.config)


class SFTInOrder(InOrder, SFTTrainer):
    """Takes the records as they come."""


class Rows(Records):
    # Newer TRL asks for them before an evaluation.
    column_names = ("input_ids", "labels", "channel")


class DPOHarness(HFHarness):
    """A sequence of the script is a pair: its tokens are chosen, others are rejected."""

    name = "trl_dpo"
    can = HFHarness.can - {"ranks"} | {"pairs"}

    def nll(self, sequence: OneSequence) -> float:
        return loss_of_pair(sequence)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Pairs(sequences, fails_at)

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        records = self.records([s for step in script.steps for s in flat(step)])
        trainer: Any = DPOInOrder(
            model=tiny_qwen2(),
            ref_model=tiny_qwen2(REFERENCE_SEED),
            args=DPOConfig(**arguments, **OPTIONS, beta=BETA),
            train_dataset=stand_in(records),
            processing_class=byte_tokenizer(),
        )
        trainer.train_dataset = records
        trainer.data_collator.pad_token_id = 0
        return attach(trainer, script.config)


class DPOInOrder(InOrder, DPOTrainer):
    """Takes the records as they come, tokenised already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class Pairs(Records):
    """Records of the preference format."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        channel = super().__getitem__(index)["channel"]
        prompt, chosen, rejected = pair_of(self.sequences[index])
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        return {**ids, "channel": channel}


def stand_in(records: Records) -> Dataset:
    """For the constructors of newer TRL, which take no dataset of torch."""
    return Dataset.from_list([records[0]])
