"""A tiny real model, records with channels, and a trainer run; shared by the HF tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments, set_seed

VOCABULARY = 61
CHANNELS = ("bbu", "rru", "lvis", "lang_chat")

Record = dict[str, Any]


def tiny_model(
    seed: int = 0, kind: type[Qwen2ForCausalLM] = Qwen2ForCausalLM, **overrides: Any
) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights and dropout, so that a disturbed RNG would show."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_dropout": 0.1,
    }
    return kind(Qwen2Config(**(sizes | overrides)))


def make_records(count: int, seed: int = 0, channels: Sequence[str] = CHANNELS) -> list[Record]:
    """Records of 2 to 17 tokens with a masked prompt; every record has another content."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        ids = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(2, 17))]
        prompt = rng.randint(1, len(ids) - 1)
        records.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100] * prompt + ids[prompt:],
                "channel": rng.choice(channels),
            }
        )
    return records


class PaddingCollator:
    """A user's collator: pads on one side, and remembers what it was given, in order."""

    def __init__(self, left: bool = False) -> None:
        self.left = left
        self.batches: list[list[list[int]]] = []

    def __call__(self, features: list[Record]) -> dict[str, torch.Tensor]:
        self.batches.append([feature["input_ids"] for feature in features])
        width = max(len(feature["input_ids"]) for feature in features)
        batch = {}
        for key, pad in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            rows = []
            for feature in features:
                fill = [pad] * (width - len(feature[key]))
                rows.append([*fill, *feature[key]] if self.left else [*feature[key], *fill])
            batch[key] = torch.tensor(rows)
        return batch


def train(
    folder: Path,
    *,
    prepare: Callable[[Trainer], object] | None = None,
    model: torch.nn.Module | None = None,
    records: Any = None,
    trainer_class: type[Trainer] = Trainer,
    trainer_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Make a trainer, let `prepare` (say `attach`) see it, train, and return it.

    What it returns has no type: transformers says of each part of a `Trainer` that it may be None.
    """
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    set_seed(0)
    dataset = make_records(64) if records is None else records
    trainer = trainer_class(
        model if model is not None else tiny_model(),
        TrainingArguments(**(given | arguments)),
        train_dataset=Dataset.from_list(dataset) if isinstance(dataset, list) else dataset,
        **({"data_collator": PaddingCollator()} | (trainer_arguments or {})),
    )
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer


def channel_logs(trainer: Trainer) -> list[dict[str, float]]:
    """The log entries that carry channel metrics, those keys only, in order."""
    picked = [
        {key: value for key, value in entry.items() if _is_channel_key(key)}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in picked if entry]


def _is_channel_key(key: str) -> bool:
    names = (*CHANNELS, "unlabeled")
    return any(key.startswith((f"{name}_", f"eval_{name}_")) for name in names)


def token_table(
    model: torch.nn.Module, records: Sequence[Record], *, entropy: bool = False
) -> dict[tuple[int, ...], Any]:
    """{token ids of a record: (channel, [(nll, correct) of each supervised target])}.

    One forward pass per record, alone, in float64: no padding, no packing, no batching.
    With `entropy`, that of the prediction is in the place of the nll.
    """
    exact = Qwen2ForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    table = {}
    for record in records:
        ids = torch.tensor([record["input_ids"]])
        with torch.no_grad():
            log_probs = exact(input_ids=ids).logits[0].log_softmax(-1)
        tokens = []
        for position in range(1, len(record["labels"])):
            target = record["labels"][position]
            if target != -100:
                row = log_probs[position - 1]
                value = -(row.exp() @ row if entropy else row[target]).item()
                tokens.append((value, int(row.argmax()) == target))
        table[tuple(record["input_ids"])] = (record.get("channel"), tokens)
    return table


def expected_metrics(
    table: dict[tuple[int, ...], Any], batches: Sequence[Sequence[Sequence[int]]], prefix: str = ""
) -> dict[str, float]:
    """The default metrics of the records in `batches`, by counting one token after the other."""
    sums: dict[str, list[float]] = {}
    for batch in batches:
        for ids in batch:
            channel, tokens = table[tuple(ids)]
            name = channel or "unlabeled"
            for nll, correct in tokens:
                entry = sums.setdefault(name, [0.0, 0.0, 0.0])
                entry[0] += nll
                entry[1] += correct
                entry[2] += 1
    total = sum(entry[2] for entry in sums.values())
    expected = {}
    for name, (nll, correct, count) in sums.items():
        expected[f"{prefix}{name}_loss"] = nll / count
        expected[f"{prefix}{name}_token_acc"] = correct / count
        expected[f"{prefix}{name}_tokens"] = count
        expected[f"{prefix}{name}_share"] = count / total
    return expected


def expected_entropies(
    model: torch.nn.Module, records: Sequence[Record], batches: Any, prefix: str = ""
) -> dict[str, float]:
    """The metric `entropy` of the records in `batches`."""
    found = expected_metrics(token_table(model, records, entropy=True), batches, prefix)
    ends = ("_loss", "_entropy")
    return {k.replace(*ends): value for k, value in found.items() if k.endswith(ends[0])}
