"""Tiny SFT records whose answers tell their channel, for gpt_sft of Megatron-Bridge."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

# Each channel answers with letters of its own.
LETTERS = {"web": "abcdefgh", "code": "nopqrstu", "math": "01234567"}


def write(folder: Path, *, channels: bool = True) -> str:
    """Write training.jsonl and validation.jsonl; some records have no channel.

    Args:
        folder: where to.
        channels: whether the records name their channel.

    Returns:
        The folder.
    """
    rng = random.Random(0)
    folder.mkdir()
    for split, count in (("training", 160), ("validation", 48)):
        lines = []
        for _ in range(count):
            name = rng.choice(list(LETTERS))
            answer = "".join(rng.choices(LETTERS[name], k=rng.randint(3, 12)))
            record = {"input": "SAY " + "X" * rng.randint(1, 6), "output": answer}
            if channels and name != "math":
                record["channel"] = name
            lines.append(json.dumps(record) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


def expected(micro_batches: list[Any]) -> dict[str, dict[str, float]]:
    """{channel: {"tokens", "loss"}} of supervised tokens [label, loss], by loops over tokens.

    The end of a text belongs to the letter before it, and a space to the letter behind it.
    """
    # The bytes of a text are its first tokens.
    owner = {ord(letter): name for name, letters in LETTERS.items() for letter in letters}
    found: dict[str, list[float]] = {}
    for row in (row for rows in micro_batches for row in rows):
        for at, (label, loss) in enumerate(row):
            if label == ord(" "):
                name = owner[row[at + 1][0]]
            else:
                name = owner.get(label) or owner[row[at - 1][0]]
            found.setdefault("unlabeled" if name == "math" else name, []).append(loss)
    return {n: {"tokens": len(own), "loss": sum(own) / len(own)} for n, own in found.items()}
