"""Writes one mixture, and tiny models with random weights, for the four trainings of the playbook.

    python configs/one_mixture/prepare.py
    channel-metrics run --patch hf_trainer configs/one_mixture/hf_sft.py
    channel-metrics run --patch trl configs/one_mixture/trl_sft.py
    swift sft configs/one_mixture/swift.yaml --external_plugins patches/ms_swift.py

docs/TRAINING_PLAYBOOK.md has the command for Megatron. The records are the first ones of each file
in configs/fused_data; `metadata._fusion_source` names the source of each.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from channel_metrics.demo.tiny import TinyModel, byte_tokenizer, tiny_model
from channel_metrics.demo.tiny_vision import save_tiny_vision_model

DATA = Path(__file__).resolve().parents[1] / "fused_data"
# {source: (records, domain, template)}
SOURCES = {
    "bbu": (12, "target", "inspection"),
    "rru": (9, "target", "inspection"),
    "lvis": (7, "source", "detection"),
    "lang_chat": (4, "source", "chat"),
}
SIZE = TinyModel(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
FOLDER = Path("runs/one_mixture")


def write_mixture(path: Path) -> None:
    """Write the records of all sources, in one random order."""
    records = []
    for name, (count, domain, template) in SOURCES.items():
        fusion = {
            "_fusion_source": name,
            "_fusion_domain": domain,
            "_fusion_template": template,
        }
        with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
            for line, _ in zip(lines, range(count), strict=False):
                record = json.loads(line)
                records.append(record | {"metadata": record["metadata"] | fusion})
    random.Random(0).shuffle(records)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text, encoding="utf-8", newline="\n")


def write_model(folder: Path) -> None:
    """Save a Qwen2 with its tokenizer, which makes one token of each byte."""
    tokenizer = byte_tokenizer()
    tiny_model(SIZE, tokenizer, max_length=1024, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(*, vision: bool = True) -> None:
    """Write everything; the vision-language model needs torchvision."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_mixture(FOLDER / "mixture.jsonl")
    write_model(FOLDER / "model")
    if vision:
        save_tiny_vision_model(FOLDER / "vision_model", "qwen2_5_vl")


if __name__ == "__main__":
    main()
