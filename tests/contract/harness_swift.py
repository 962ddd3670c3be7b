"""ms-swift's Seq2SeqTrainer, on records that are encoded already.

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
from contract.script import Script, flat

__all__ = ["SwiftHarness"]


class SwiftHarness(HFHarness):
    """folder: of its model."""

    name = "swift"
    preload = SWIFT
    is_here = False

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
        from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments

        model, processor = get_model_processor(
            str(self.folder),
            model_type="qwen2",
            torch_dtype=torch.float32,
            attn_impl="sdpa",
            device_map="cpu",
            use_hf=True,
        )
        template = get_template(processor, template_type="qwen2_5")
        template.set_mode("train")
        own = {
            "check_model": False,
            "dataloader_num_workers": 0,
            "gradient_checkpointing": False,
            "logging_first_step": False,
            "train_dataloader_shuffle": False,
        }
        trainer = Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**arguments | own),
            template=template,
            train_dataset=Records([s for step in script.steps for s in flat(step)]),
        )
        return attach(trainer, script.config)
