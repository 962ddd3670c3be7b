"""The Trainer of transformers, with a tiny Qwen2 that a learning rate of 0 leaves as it is."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import SequentialSampler
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.hf.columns import NAMES_COLUMN
from contract.harness import Forking, watch_windows
from contract.labels import labels_of_record, name_of
from contract.script import ROWS, Evaluation, OneSequence, Ran, Script, flat, role_of

__all__ = [
    "HFHarness",
    "InOrder",
    "NamedRecords",
    "Records",
    "collate",
    "generated_together",
    "nll_of",
    "tiny_qwen2",
    "token_ids",
]

VOCABULARY = 61


class Records(torch.utils.data.Dataset[dict[str, Any]]):
    """Records that cannot be scanned beforehand. fails_at: the index that raises."""

    def __init__(self, sequences: list[OneSequence], fails_at: int | None = None) -> None:
        self.sequences, self.fails_at = sequences, fails_at

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sequence, labels = self.sequences[index], self.labels(index)
        ids = token_ids(sequence)
        return {
            "input_ids": ids,
            "labels": [-100, *ids[1:]],
            **labels,
            "roles": [role_of(token) for token in ids],
            "id": sequence.number,
        }

    def labels(self, index: int) -> dict[str, str | None]:
        """The fields of a record that hold its labels."""
        if index == self.fails_at:
            raise RuntimeError("an evaluation that fails")
        return labels_of_record(self.sequences[index])


class NamedRecords(Records):
    """As the preprocessing of LLaMA-Factory and of Axolotl leaves them."""

    column_names = ("input_ids", "labels", NAMES_COLUMN)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = super().__getitem__(index)
        del record["channel"], record["lang"]
        return {**record, NAMES_COLUMN: name_of(self.sequences[index])}


class HFHarness(Forking):
    """What other trainers that are built on the Trainer do in another way, they override."""

    name = "hf"
    can = frozenset({"ranks", "save", "fails", "stops", "columns", "ids"})
    reserved = "eval"

    def nll(self, sequence: OneSequence) -> float:
        return nll_of(sequence)

    def losses(self, sequence: OneSequence) -> list[float]:
        return nlls_of(sequence)

    def tokens(self, sequence: OneSequence) -> list[int]:
        return token_ids(sequence)[1:]

    def records(self, sequences: list[OneSequence], fails_at: int | None = None) -> Records:
        """What the trainer takes for a dataset."""
        return Records(sequences, fails_at)

    def make_trainer(self, script: Script, arguments: dict[str, Any]) -> Any:
        """The trainer with its metrics; its batches come in the order of the script."""
        records = self.records([s for step in script.steps for s in flat(step)])
        trainer = InOrder(
            tiny_qwen2(),
            TrainingArguments(**arguments),
            train_dataset=records,
            data_collator=collate,
        )
        return attach(trainer, script.config)

    def train(self, script: Script, folder: Path, ran: Ran) -> None:
        size = dist.get_world_size() if dist.is_initialized() else 1
        trainer = self.make_trainer(
            script,
            {
                "output_dir": str(folder),
                "max_steps": len(script.steps),
                "per_device_train_batch_size": ROWS,
                "per_device_eval_batch_size": ROWS,
                "gradient_accumulation_steps": len(script.steps[0]) // size,
                "logging_steps": script.every,
                "learning_rate": 0.0,
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "save_strategy": "no" if script.save_at is None else "steps",
                "save_steps": script.save_at or 500,
                "save_only_model": False,
            },
        )
        watch_windows(trainer.channel_metrics, ran)
        trainer.add_callback(_Following(self, trainer, script, ran))
        try:
            trainer.train(resume_from_checkpoint=script.resume and str(script.resume))
        finally:
            ran.logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        if script.save_at is not None:
            ran.checkpoint = folder / f"checkpoint-{script.save_at}"


class InOrder(Trainer):
    """Takes the records as they come."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        records: Any = self.train_dataset
        return SequentialSampler(records)


def generated_together(trainer: Any) -> list[int]:
    """The records of a GRPO trainer in their order.

    It generates those of a step together, and asks for them again in each of its micro-batches.
    """
    size, steps = trainer.args.generation_batch_size, trainer.args.steps_per_generation
    return [
        index
        for start in range(0, len(trainer.train_dataset), size)
        for _ in range(steps)
        for index in range(start, start + size)
    ]


class _Following(TrainerCallback):
    def __init__(self, harness: HFHarness, trainer: Any, script: Script, ran: Ran) -> None:
        self.harness, self.trainer, self.script, self.ran = harness, trainer, script, ran

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ran.steps += 1
        for evaluation in self.script.evaluations:
            if evaluation.after == state.global_step:
                self._evaluate(evaluation)

    def _evaluate(self, evaluation: Evaluation) -> None:
        fails_at = ROWS if evaluation.fails else None
        records = self.harness.records(flat(evaluation.batches), fails_at)
        try:
            self.ran.evaluations.append(self.trainer.evaluate(records))
        except RuntimeError:
            assert evaluation.fails


def token_ids(sequence: OneSequence) -> list[int]:
    """One token of a prompt, and the supervised ones."""
    rng = random.Random(sequence.number)
    return [rng.randrange(1, VOCABULARY) for _ in range(sequence.tokens + 1)]


def collate(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    width = max(len(record["input_ids"]) for record in records)
    pads = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([r[key] + [pad] * (width - len(r[key])) for r in records])
        for key, pad in pads.items()
    }
    lengths = [len(record["input_ids"]) for record in records]
    mask = [[1] * length + [0] * (width - length) for length in lengths]
    return {**batch, "attention_mask": torch.tensor(mask)}


def tiny_qwen2(seed: int = 0, vocabulary: int = VOCABULARY) -> Qwen2ForCausalLM:
    """The same model for everybody, without dropout."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return Qwen2ForCausalLM(config)


def nll_of(sequence: OneSequence) -> float:
    return sum(nlls_of(sequence))


@cache
def nlls_of(sequence: OneSequence) -> list[float]:
    """By a forward of this sequence alone, in float64."""
    ids = torch.tensor([token_ids(sequence)])
    with torch.no_grad():
        logits = tiny_qwen2().double().eval()(input_ids=ids).logits[0, :-1]
    log_probs = logits.log_softmax(-1)
    return [-float(one) for one in log_probs.gather(1, ids[0, 1:, None])]
