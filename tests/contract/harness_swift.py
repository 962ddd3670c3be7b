"""ms-swift's Seq2SeqTrainer, on records that are encoded already.

Its runs are forked from a process that has imported ms-swift. Here it is never imported: it
changes transformers for everybody.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fork_client import Server

from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.trainers.hf import attach
from contract.harness_hf import HFHarness, Records, tiny_qwen2
from contract.script import Ran, Script, flat

__all__ = ["SwiftHarness", "run_job"]

SECONDS = 120


class SwiftHarness(HFHarness):
    """folder: of its model. server: on which the runs are forked; not needed to make trainers."""

    name = "swift"

    def __init__(self, folder: Path, server: Server | None = None) -> None:
        self.folder, self.server = folder, server

    def save_model(self) -> None:
        """The model that the runs load."""
        tokenizer = byte_tokenizer()
        # ms-swift pads with it, and the model knows fewer tokens than the tokenizer.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        tokenizer.save_pretrained(self.folder)
        tiny_qwen2().save_pretrained(self.folder)

    def run(self, script: Script, folder: Path, ranks: int = 1) -> list[Ran]:
        assert self.server is not None
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(script, folder / "script.pt")
        answer = self.server.ask(
            folder,
            "contract.harness_swift:run_job",
            ranks=ranks,
            timeout=SECONDS,
            meet=ranks > 1,
            model=str(self.folder),
        )
        said = [path.read_text()[-3000:] for path in sorted(folder.glob("rank*.err"))]
        assert answer["codes"] == [0] * ranks, said
        return [torch.load(folder / f"ran{rank}.pt", weights_only=False) for rank in range(ranks)]

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


def run_job(job: dict[str, Any], rank: int) -> int:
    """On a rank: run the script of the folder, and keep what came of it there."""
    torch.set_num_threads(1)
    if job["ranks"] > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS // 2))
    folder = Path(job["folder"])
    script = torch.load(folder / "script.pt", weights_only=False)
    ran = SwiftHarness(Path(job["model"])).run_here(script, folder)
    torch.save(ran, folder / f"ran{rank}.pt")
    return 0
