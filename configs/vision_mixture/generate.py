"""Writes a small mixture of images and text, and a tiny Qwen2.5-VL with random weights to train.

    python configs/vision_mixture/generate.py
    swift sft configs/vision_mixture/swift.yaml --external_plugins patches/ms_swift.py

Three sources: `bbu` counts the squares in a picture, `lvis` names their colour, `lang_chat` has no
picture. `metadata._fusion_source` names the source of each record.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from channel_metrics.demo.tiny_vision import save_tiny_vision_model

NUM_TRAIN, NUM_VAL = 24, 6
SIDE, SQUARE = 56, 14
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220)}
FOLDER = Path("runs/vision_mixture")


def picture(rng: random.Random, path: Path) -> tuple[int, str]:
    """Save a picture of some squares; their number and colour."""
    count, colour = rng.randint(1, 4), rng.choice(list(COLOURS))
    image = Image.new("RGB", (SIDE * rng.randint(1, 2), SIDE), "white")
    places = [(x, y) for x in range(0, SIDE, SQUARE) for y in range(0, SIDE, SQUARE)]
    for place in rng.sample(places, count):
        image.paste(COLOURS[colour], (*place, place[0] + SQUARE, place[1] + SQUARE))
    image.save(path)
    return count, colour


def record(rng: random.Random, source: str, path: Path) -> dict[str, Any]:
    images = []
    if source == "lang_chat":
        first, second = rng.randint(1, 9), rng.randint(1, 9)
        question, answer = f"Add {first} and {second}.", str(first + second)
    else:
        count, colour = picture(rng, path)
        images.append(str(path))
        question = "<image>How many?" if source == "bbu" else "<image>Which colour?"
        answer = f"{count} squares" if source == "bbu" else colour
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        "images": images,
        "metadata": {"_fusion_source": source},
    }


def write_records(folder: Path, split: str, count: int) -> Path:
    """Write `count` records, and their pictures, into a folder; the path of the JSONL file."""
    rng = random.Random(split)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        for number in range(count):
            source = ("bbu", "lvis", "lang_chat")[number % 3]
            image = (folder / "images" / f"{split}_{number}.png").resolve()
            lines.write(json.dumps(record(rng, source, image)) + "\n")
    return path


def main(folder: Path) -> None:
    write_records(folder, "train", NUM_TRAIN)
    write_records(folder, "val", NUM_VAL)
    save_tiny_vision_model(folder / "model", "qwen2_5_vl")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
