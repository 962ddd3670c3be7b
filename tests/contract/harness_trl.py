"""TRL's SFTTrainer, padded, DPOTrainer, RewardTrainer and KTOTrainer, with tiny models."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl_tools import CHECKPOINTING

from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.trainers.hf import attach
from contract.harness_hf import HFHarness, InOrder, Records, tiny_qwen2
from contract.pairs import (
    BETA,
    REFERENCE_SEED,
    answer_of,
    loss_of_answer,
    loss_of_pair,
    loss_of_rewards,
    padding_tokenizer,
    pair_of,
    reward_model,
)
from contract.script import OneSequence, Script, flat

__all__ = ["DPOHarness", "KTOHarness", "PairHarness", "RewardHarness", "SFTHarness", "stand_in"]

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
    column_names = ("input_ids", "labels", "channel", "lang", "roles", "id")


class PairHarness(HFHarness):
    """A sequence of the script is a pair, or a single answer, see pairs.py."""

    can = HFHarness.can - {"ranks", "columns", "ids"} | {"pairs"}

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        records = self.records([s for step in script.steps for s in flat(step)])
        trainer = self.trainer(arguments | OPTIONS, records)
        trainer.train_dataset = records
        return attach(trainer, script.config)

    def trainer(self, arguments: dict[str, Any], records: Records) -> Any:
        raise NotImplementedError


class DPOHarness(PairHarness):
    name = "trl_dpo"

    def nll(self, sequence: OneSequence) -> float:
        return loss_of_pair(sequence)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Pairs(sequences, fails_at)

    def trainer(self, arguments: dict[str, Any], records: Records) -> Any:
        return DPOInOrder(
            model=tiny_qwen2(),
            ref_model=tiny_qwen2(REFERENCE_SEED),
            args=DPOConfig(**arguments, beta=BETA),
            train_dataset=stand_in(records),
            processing_class=padding_tokenizer(),
        )


class RewardHarness(PairHarness):
    name = "trl_reward"

    def nll(self, sequence: OneSequence) -> float:
        return loss_of_rewards(sequence)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return RewardPairs(sequences, fails_at)

    def trainer(self, arguments: dict[str, Any], records: Records) -> Any:
        return RewardInOrder(
            model=reward_model(),
            args=RewardConfig(**arguments),
            train_dataset=stand_in(records),
            processing_class=padding_tokenizer(),
        )


class KTOHarness(PairHarness):
    name = "trl_kto"

    def nll(self, sequence: OneSequence) -> float:
        return loss_of_answer(sequence)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Answers(sequences, fails_at)

    def trainer(self, arguments: dict[str, Any], records: Records) -> Any:
        make: Any = KTOInOrder
        return make(
            model=tiny_qwen2(),
            ref_model=tiny_qwen2(REFERENCE_SEED),
            args=KTOConfig(**arguments, beta=BETA, loss_type="apo_zero_unpaired"),
            train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}]),
            processing_class=padding_tokenizer(),
        )


class Prepared(InOrder):
    """Takes the records as they come, tokenised already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class DPOInOrder(Prepared, DPOTrainer):
    pass


class RewardInOrder(Prepared, RewardTrainer):
    pass


class KTOInOrder(Prepared, KTOTrainer):
    pass


class Pairs(Records):
    """Records of the preference format."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.labels(index)
        prompt, chosen, rejected = pair_of(self.sequences[index])
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        return {**ids, **labels}


class RewardPairs(Pairs):
    """Each answer with its prompt."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = super().__getitem__(index)
        prompt = pair.pop("prompt_ids")
        return pair | {side: prompt + pair[side] for side in ("chosen_ids", "rejected_ids")}


class Answers(Records):
    """Single answers, as trl 0.29 prepares them and as newer TRL does."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = {**self.labels(index)}
        prompt, answer, record["label"] = answer_of(self.sequences[index])
        newer = {"prompt_ids": prompt, "completion_ids": answer}
        older = {
            "prompt_input_ids": prompt,
            "completion_input_ids": prompt + answer,
            "completion_attention_mask": [1] * len(prompt + answer),
            "completion_labels": [-100] * len(prompt) + answer,
        }
        return record | newer | older


def stand_in(records: Records) -> Dataset:
    """For the constructors of newer TRL, which take no dataset of torch."""
    return Dataset.from_list([records[0]])
