"""The transformers Trainer with Qwen2.5-VL and Qwen3-VL. Its collator calls the model's processor.

One step is a whole epoch, so its window holds every record, under the weights that the run began
with. The oracle is a loop over the records, one forward each.
"""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_client import Preload
from hf_case_tools import weights_hash
from rank_cases import Case, RanksOf, case
from vision_tools import needs_vision

pytestmark = needs_vision
VISION = Preload(("vision_tools:load_torchvision", "channel_metrics.trainers.hf"))
alone = case(VISION, ranks=1)

COLOURS = ("red", "green", "blue")
NUM_RECORDS = 6


def records() -> list[dict[str, Any]]:
    """Pictures of one colour (`lvis`), and text without a picture (`chat`)."""
    from PIL import Image

    rng = random.Random(0)
    found = []
    for index in range(NUM_RECORDS):
        colour = rng.choice(COLOURS)
        image = Image.new("RGB", (56 * rng.randint(1, 2), 56), colour)
        text: list[dict[str, Any]] = [{"type": "text", "text": "x" * rng.randint(1, 9)}]
        is_text = index % 3 == 0
        content = text if is_text else [{"type": "image"}, *text]
        found.append(
            {
                "messages": [{"role": "user", "content": content}],
                "answer": colour,
                "image": None if is_text else image,
                "metadata": {"_fusion_source": "chat" if is_text else "lvis"},
            }
        )
    return found


class ProcessorCollator:
    """As in the recipes for these models: the processor makes the batch, labels are the answers."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        prompts = [
            self.processor.apply_chat_template(f["messages"], add_generation_prompt=True)
            for f in features
        ]
        texts = [p + f["answer"] + "<|im_end|>" for p, f in zip(prompts, features, strict=True)]
        images = [f["image"] for f in features if f["image"] is not None]
        options = {"return_tensors": "pt", "padding": True, "padding_side": "right"}
        batch = self.processor(text=texts, images=images or None, **options)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, feature in zip(labels, features, strict=True):
            length = int((row != -100).sum())
            row[: length - len(feature["answer"]) - 1] = -100
        batch["labels"] = labels
        return batch


def train(folder: Path, kind: str, processor: Any, *, metrics: bool) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from channel_metrics import MetricsConfig
    from channel_metrics.demo.tiny_vision import tiny_vision_model
    from channel_metrics.trainers.hf import attach

    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=NUM_RECORDS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    model = tiny_vision_model(kind)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=records(),
        data_collator=ProcessorCollator(processor),
    )
    if metrics:
        attach(trainer, MetricsConfig(axes={"modality": {"by": "modality"}}))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "log": log,
        "weights": weights_hash(model),
        "random": int(torch.get_rng_state().sum()),
    }


def one_by_one(kind: str, processor: Any) -> dict[str, list[float]]:
    """{channel: [nll, tokens, right]}"""
    from channel_metrics.demo.tiny_vision import tiny_vision_model

    model, collate = tiny_vision_model(kind), ProcessorCollator(processor)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for record in records():
        batch = collate([record])
        target = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1].double()
        kept = target != -100
        nll = torch.nn.functional.cross_entropy(logits[kept], target[kept], reduction="sum")
        right = int((logits.argmax(-1) == target)[kept].sum())
        of = sums[record["metadata"]["_fusion_source"]]
        for at, value in enumerate((float(nll), int(kept.sum()), right)):
            of[at] += value
    return dict(sums)


def with_and_without(folder: Path, kind: str) -> Any:
    from transformers import AutoProcessor

    from channel_metrics.demo.tiny_vision import save_tiny_vision_model

    processor = AutoProcessor.from_pretrained(save_tiny_vision_model(folder, kind))
    found: dict[str, Any] = {"expected": one_by_one(kind, processor)}
    for who, metrics in (("off", False), ("on", True)):
        torch.manual_seed(0)
        found[who] = train(folder / who, kind, processor, metrics=metrics)
    return found


@alone
def qwen2_5_vl(folder: Path) -> Any:
    return with_and_without(folder, "qwen2_5_vl")


@alone
def qwen3_vl(folder: Path) -> Any:
    return with_and_without(folder, "qwen3_vl")


@pytest.mark.parametrize("of", [qwen2_5_vl, qwen3_vl])
def test_images_beside_text(ranks_of: RanksOf, of: Case) -> None:
    (found,) = ranks_of(of)
    off, on = found["off"], found["on"]
    assert (on["weights"], on["random"]) == (off["weights"], off["random"])
    for theirs, ours in zip(off["log"], on["log"], strict=True):
        assert theirs.items() <= ours.items()
    first, expected = on["log"][0], found["expected"]
    assert set(expected) == {"chat", "lvis"}
    # The config of the model tells the ids of its image tokens. They are in the prompts, which
    # have no loss.
    assert first["modality/text_tokens"] == sum(n for _, n, _ in expected.values())
    assert not any(key.startswith("modality/image") for key in first)
    for name, (nll, tokens, right) in expected.items():
        assert first[f"{name}_tokens"] == tokens
        assert first[f"{name}_token_acc"] == right / tokens
        assert first[f"{name}_loss"] == pytest.approx(nll / tokens, rel=1e-5)
        assert first[f"{name}_share"] == tokens / sum(n for _, n, _ in expected.values())
