"""ms-swift's Seq2SeqTrainer and DPOTrainer, on records that are encoded already.

Its runs are forked from a process that has imported ms-swift. Here it is never imported: it
changes transformers for everybody.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from swift_tools import SWIFT

from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.trainers.hf import attach
from contract.harness_hf import HFHarness, Records, tiny_qwen2
from contract.pairs import BETA, REFERENCE_SEED, loss_of_pair, pair_of
from contract.script import OneSequence, Script, flat

__all__ = ["SwiftDPOHarness", "SwiftHarness"]

OWN = {
    "check_model": False,
    "dataloader_num_workers": 0,
    "gradient_checkpointing": False,
    "logging_first_step": False,
    "train_dataloader_shuffle": False,
}


class SwiftHarness(HFHarness):
    """folder: of its model."""

    name = "swift"
    preload = SWIFT
    is_here = False
    mode = "train"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_model(self) -> None:
        """The model that the runs load."""
        tokenizer = byte_tokenizer()
        # ms-swift pads with it, and the model knows fewer tokens than the tokenizer.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        tokenizer.save_pretrained(self.folder)
        tiny_qwen2().save_pretrained(self.folder)

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        from swift.model import get_model_processor
        from swift.template import get_template

        model, processor = get_model_processor(
            str(self.folder),
            model_type="qwen2",
            torch_dtype=torch.float32,
            attn_impl="sdpa",
            device_map="cpu",
            use_hf=True,
        )
        template = get_template(processor, template_type="qwen2_5")
        template.set_mode(self.mode)
        records = self.records([s for step in script.steps for s in flat(step)])
        trainer = self.trainer(model, arguments | OWN, template=template, train_dataset=records)
        return attach(trainer, script.config)

    def trainer(self, model: Any, arguments: dict[str, Any], **given: Any) -> Any:
        from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments

        return Seq2SeqTrainer(model, args=Seq2SeqTrainingArguments(**arguments), **given)


class SwiftDPOHarness(SwiftHarness):
    """A sequence of the script is a pair, see pairs.py."""

    name = "swift_dpo"
    can = SwiftHarness.can | {"pairs"}
    mode = "rlhf"

    def nll(self, sequence: OneSequence) -> float:
        return loss_of_pair(sequence)

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        return Pairs(sequences, fails_at)

    def trainer(self, model: Any, arguments: dict[str, Any], **given: Any) -> Any:
        from swift.rlhf_trainers import DPOConfig, DPOTrainer

        config = DPOConfig(**arguments, bf16=False, loss_type="sigmoid", beta=BETA)
        return DPOTrainer(model, tiny_qwen2(REFERENCE_SEED), args=config, **given)


class Pairs(Records):
    """Pairs as ms-swift's template encodes them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = {"channel": super().__getitem__(index)["channel"]}
        prompt, *answers = pair_of(self.sequences[index])
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            record[f"{side}_input_ids"] = [*prompt, *answer]
            record[f"{side}_labels"] = [-100] * len(prompt) + answer
        return record
