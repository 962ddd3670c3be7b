"""What the tests of the SFTTrainer share: a run, and what the model saw in it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import trl
from packaging.version import Version
from transformers import Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.data_utils import pack_dataset
from trl_tools import (
    ALPHABETS,
    EOS,
    arguments,
    run,
    text_records,
)

from channel_metrics.trainers.trl import SFTChannelMetricsMixin

OLD = Version(trl.__version__) < Version("1")
_PACKER = inspect.getsource(pack_dataset)
BFD = "bfd" if not OLD or '"bfd"' in _PACKER else "ffd"
SPLIT = "bfd-requeue" if OLD else "bfd_split"
HAS_SPLIT = not OLD or f'"{SPLIT}"' in _PACKER
SHUFFLES = "shuffle_dataset" in SFTConfig.__dataclass_fields__
# Older trl gives padding-free rows position ids only with flash attention.
HAS_BOUNDS = Version(trl.__version__) >= Version("0.24")
OF_LETTER = {ord(letter): name for name, letters in ALPHABETS.items() for letter in letters}


class MySFT(SFTChannelMetricsMixin, SFTTrainer):
    pass


class Seen:
    """The inputs of each forward pass with labels, and the model that they met."""

    def __init__(self) -> None:
        self.batches: dict[bool, list[dict[str, Any]]] = {True: [], False: []}

    def __call__(self, trainer: Any) -> None:
        trainer.model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names = ("input_ids", "labels", "attention_mask", "position_ids")
        if kwargs.get("labels") is not None:
            kept = {name: kwargs[name].clone() for name in names if kwargs.get(name) is not None}
            self.batches[model.training].append(kept)


def expected(
    model: Any,
    batches: list[dict[str, Any]],
    prefix: str = "",
    names: Mapping[int, str] = OF_LETTER,
) -> dict[str, float]:
    """Loss, accuracy, tokens, share: one target after the other, its channel read from it.

    names: the name of each letter, by default its channel.
    """
    exact = Qwen2ForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    sums: dict[str, list[float]] = {}
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            log_probs = exact(**inputs, use_cache=False).logits.log_softmax(-1)
        for row, labels in enumerate(batch["labels"].tolist()):
            ids = batch["input_ids"][row].tolist()
            for position in range(1, len(labels)):
                target = labels[position]
                if target == -100:
                    continue
                # The end of a text is of the channel of the letter before it.
                letter = target if target != EOS else ids[position - 1]
                entry = sums.setdefault(names[letter], [0.0, 0.0, 0.0])
                row_log_probs = log_probs[row, position - 1]
                entry[0] -= row_log_probs[target].item()
                entry[1] += int(row_log_probs.argmax()) == target
                entry[2] += 1
    total = sum(entry[2] for entry in sums.values())
    found = {}
    for name, (nll, correct, tokens) in sums.items():
        found[f"{prefix}{name}_loss"] = nll / tokens
        found[f"{prefix}{name}_token_acc"] = correct / tokens
        found[f"{prefix}{name}_tokens"] = tokens
        found[f"{prefix}{name}_share"] = tokens / total
    return found


def config(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(**arguments(folder, **{"max_length": 24, **options}))


def sft(folder: Path, trainer_class: Any = SFTTrainer, records: Any = None, **options: Any) -> Any:
    names = ("prepare", "before", "eval_dataset", "model", "channel_metrics")
    keywords = {name: options.pop(name) for name in names if name in options}
    records = text_records(96) if records is None else records
    return run(trainer_class, config(folder, **options), records, **keywords)
