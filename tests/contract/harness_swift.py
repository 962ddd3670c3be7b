"""ms-swift's Seq2SeqTrainer and the trainers of `swift rlhf`, on records that are encoded already.

Its runs are forked from a process that has imported ms-swift. Here it is never imported: it
changes transformers for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from swift_tools import SWIFT
from torch.utils.data import SequentialSampler

from channel_metrics.trainers.hf import attach
from contract.harness_hf import HFHarness, Records, generated_together, tiny_qwen2
from contract.labels import name_of
from contract.pairs import (
    BETA,
    REFERENCE_SEED,
    answer_of,
    loss_of_answer,
    loss_of_pair,
    loss_of_rewards,
    odds_loss,
    padding_tokenizer,
    pair_of,
    preference_loss,
    reward_model,
    reward_of,
    scores,
)
from contract.script import OneSequence, Script, flat

__all__ = [
    "SwiftCPOHarness",
    "SwiftDPOHarness",
    "SwiftGRPOHarness",
    "SwiftHarness",
    "SwiftKTOHarness",
    "SwiftORPOHarness",
    "SwiftPairHarness",
    "SwiftRewardHarness",
]

OWN = {
    "check_model": False,
    "dataloader_num_workers": 0,
    "gradient_checkpointing": False,
    "logging_first_step": False,
    "train_dataloader_shuffle": False,
}


class SwiftHarness(HFHarness):
    """folder: of the models."""

    name = "swift"
    can = HFHarness.can - {"columns", "ids"}
    preload = SWIFT
    is_here = False
    mode = "train"
    model = "causal"
    task: ClassVar[dict[str, Any]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Encoded(sequences, fails_at)

    def save_models(self) -> None:
        """The models that the runs load."""
        tokenizer = padding_tokenizer()
        models = {
            "causal": tiny_qwen2(),
            "reward": reward_model(),
            "all_tokens": tiny_qwen2(vocabulary=len(tokenizer)),
        }
        for name, model in models.items():
            tokenizer.save_pretrained(self.folder / name)
            model.save_pretrained(self.folder / name)

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        from swift.model import get_model_processor
        from swift.template import get_template

        model, processor = get_model_processor(
            str(self.folder / self.model),
            model_type="qwen2",
            torch_dtype=torch.float32,
            attn_impl="sdpa",
            device_map="cpu",
            use_hf=True,
            **self.task,
        )
        template = get_template(processor, template_type="qwen2_5")
        template.set_mode(self.mode)
        records = self.records([s for step in script.steps for s in flat(step)])
        trainer = self.trainer(model, arguments | OWN, template=template, train_dataset=records)
        return attach(trainer, script.config)

    def trainer(self, model: Any, arguments: dict[str, Any], **given: Any) -> Any:
        from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments

        return Seq2SeqTrainer(model, args=Seq2SeqTrainingArguments(**arguments), **given)


class SwiftPairHarness(SwiftHarness):
    """A sequence of the script is a pair, see pairs.py."""

    can = SwiftHarness.can | {"pairs"}
    mode = "rlhf"
    kind = ""
    options: ClassVar[dict[str, Any]] = {}

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Pairs(sequences, fails_at)

    def trainer(self, model: Any, arguments: dict[str, Any], **given: Any) -> Any:
        from swift import rlhf_trainers

        config = getattr(rlhf_trainers, f"{self.kind}Config")
        args = config(**arguments, bf16=False, **self.options)
        trainer = getattr(rlhf_trainers, f"{self.kind}Trainer")(model, args=args, **given)
        # Not all of them read `train_dataloader_shuffle`.
        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
        return trainer


class SwiftDPOHarness(SwiftPairHarness):
    name, kind = "swift_dpo", "DPO"
    options: ClassVar[dict[str, Any]] = {"loss_type": "sigmoid", "beta": BETA}

    def nll(self, sequence: OneSequence) -> float:
        return loss_of_pair(sequence)

    def trainer(self, model: Any, arguments: dict[str, Any], **given: Any) -> Any:
        return super().trainer(model, arguments, ref_model=tiny_qwen2(REFERENCE_SEED), **given)


class SwiftCPOHarness(SwiftPairHarness):
    name, kind = "swift_cpo", "CPO"
    options: ClassVar[dict[str, Any]] = {"loss_type": "sigmoid", "beta": BETA, "cpo_alpha": 0.0}

    def nll(self, sequence: OneSequence) -> float:
        return preference_loss(sequence)


class SwiftORPOHarness(SwiftPairHarness):
    name, kind = "swift_orpo", "ORPO"
    options: ClassVar[dict[str, Any]] = {"beta": BETA}

    def loss(self, sequences: Sequence[OneSequence]) -> float:
        return odds_loss(sequences)


class SwiftRewardHarness(SwiftPairHarness):
    name, kind = "swift_rm", "Reward"
    model = "reward"
    task: ClassVar[dict[str, Any]] = {"task_type": "seq_cls", "num_labels": 1}

    def nll(self, sequence: OneSequence) -> float:
        return loss_of_rewards(sequence)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return RewardPairs(sequences, fails_at)


class SwiftKTOHarness(SwiftDPOHarness):
    """A sequence is a single answer."""

    name, kind = "swift_kto", "KTO"
    mode = "kto"
    options: ClassVar[dict[str, Any]] = {"loss_type": "apo_zero_unpaired", "beta": BETA}

    def nll(self, sequence: OneSequence) -> float:
        return loss_of_answer(sequence)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Answers(sequences, fails_at)


class SwiftGRPOHarness(SwiftPairHarness):
    """A sequence is the one completion of a prompt."""

    name, kind = "swift_grpo", "GRPO"
    can = SwiftPairHarness.can | {"rewards"}
    mode = "train"
    model = "all_tokens"

    def nll(self, sequence: OneSequence) -> float:
        return reward_of(sequence.number)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Prompts(sequences, fails_at)

    def trainer(self, model: Any, arguments: dict[str, Any], **given: Any) -> Any:
        from swift.rlhf_trainers import GRPOConfig, GRPOTrainer

        options: dict[str, Any] = {"num_generations": 1, "max_completion_length": 2, "beta": 0.0}
        args = GRPOConfig(**arguments, **options, bf16=False, loss_type="grpo")
        trainer = GRPOTrainer(model, reward_funcs=[scores], args=args, **given)
        trainer._get_train_sampler = lambda *_: generated_together(trainer)
        return trainer


class Encoded(Records):
    """As the preprocessing with the patch leaves them: the labels are joined in `channel`."""

    def labels(self, index: int) -> dict[str, str | None]:
        return {**super().labels(index), "channel": name_of(self.sequences[index])}


class Prompts(Encoded):
    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self.sequences[index].number
        messages = [{"role": "user", "content": str(number)}]
        return {"messages": messages, "number": number, **self.labels(index)}


class Pairs(Encoded):
    """Pairs as ms-swift's template encodes them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = {**self.labels(index)}
        prompt, *answers = pair_of(self.sequences[index])
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            record |= encoded(side, prompt, answer)
        return record


class RewardPairs(Pairs):
    """Without labels."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = super().__getitem__(index)
        return {key: value for key, value in pair.items() if not key.endswith("labels")}


class Answers(Encoded):
    """Single answers as ms-swift's template encodes them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, answer, desirable = answer_of(self.sequences[index])
        labels = self.labels(index)
        return {**encoded("chosen", prompt, answer), "label": desirable, **labels}


def encoded(side: str, prompt: list[int], answer: list[int]) -> dict[str, Any]:
    return {
        f"{side}_input_ids": [*prompt, *answer],
        f"{side}_labels": [-100] * len(prompt) + answer,
    }
