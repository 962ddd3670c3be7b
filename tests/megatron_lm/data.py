"""Tiny datasets in Megatron's own formats, the same for the same seed.

The tokens of a document tell its source: `web` draws from 0 to 249, `code` from 0 to 19, `math`
from 100 to 139, so that their losses soon differ. The id 255 ends a document.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np

END_OF_DOCUMENT = 255
VOCABULARY = 256
# Name: documents, lowest id, one past the highest.
SOURCES = {"web": (120, 0, 250), "code": (80, 0, 20), "math": (60, 100, 140)}
WEIGHTS = {"web": "0.5", "code": "0.3", "math": "0.2"}
SPLITS = ("train", "valid", "test")
WORDS = ["a", "b", "c", "d", "e", "f", "g", "import", "class", "def", "return", "bbu", "rru"]
INT32_CODE = 4
# All is for training. Not for sets that are given per split, with which Megatron refuses it.
SPLIT = ("--split", "100,0,0")
# After the arguments of a set: a part of it is for validation, twice in a run.
HELD_OUT = ("--split", "80,20,0", "--eval-interval", "3", "--eval-iters", "2")


class Data:
    """Datasets in `folder`, written when first asked for; methods return arguments of Megatron."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def prefix(self, name: str, split: str = "") -> str:
        """The prefix of a source's `.bin` and `.idx`; with a split, of that part's own."""
        stem = "_".join(part for part in (name, split, "text_document") if part)
        prefix = self.folder / stem
        if not prefix.with_suffix(".idx").exists():
            count, low, high = SOURCES[name]
            seed = list(SOURCES).index(name) + 10 * ("", *SPLITS).index(split)
            write_indexed(prefix, documents(count, low, high, seed=seed))
        return str(prefix)

    def blend(self, *names: str) -> tuple[str, ...]:
        """`--data-path` with the weights and prefixes of `names` (default: all)."""
        return ("--data-path", *self.weighted(*names), *SPLIT)

    def weighted(self, *names: str, split: str = "") -> tuple[str, ...]:
        pairs = [(WEIGHTS[name], self.prefix(name, split)) for name in names or SOURCES]
        return tuple(part for pair in pairs for part in pair)

    def single(self, name: str) -> tuple[str, ...]:
        """`--data-path` with one prefix: no blend."""
        return ("--data-path", self.prefix(name), *SPLIT)

    def mock(self) -> tuple[str, ...]:
        """Megatron's own invented data."""
        return ("--mock-data", *SPLIT)

    def data_args_file(self, *names: str) -> tuple[str, ...]:
        """`--data-args-path`: the blend stands in a file."""
        path = self.folder / f"blend_{'_'.join(names)}.txt"
        path.write_text(" ".join(self.weighted(*names)))
        return ("--data-args-path", str(path), *SPLIT)

    def per_split(self, **names: tuple[str, ...]) -> tuple[str, ...]:
        """`--train-data-path` and so on: `per_split(train=("web", "code"), valid=("math",))`."""
        return tuple(
            part
            for split, chosen in names.items()
            for part in (f"--{split}-data-path", *self.weighted(*chosen, split=split))
        )

    def per_split_file(self, **names: tuple[str, ...]) -> tuple[str, ...]:
        """`--per-split-data-args-path`: the blends per split stand in a JSON file."""
        # A split without data sets must be there too, as null.
        blends = dict.fromkeys(SPLITS) | {
            split: list(self.weighted(*chosen, split=split)) for split, chosen in names.items()
        }
        stem = "_".join(part for split, chosen in names.items() for part in (split, *chosen))
        path = self.folder / f"per_split_{stem}.json"
        path.write_text(json.dumps(blends))
        return ("--per-split-data-args-path", str(path))

    def sft(self, *, channel_in: str = "message", lines: int = 60) -> tuple[str, ...]:
        """`--sft` with packs of two to four conversations, and a byte-level tokenizer.

        channel_in: where the channel stands: `message` (the first of each conversation), `line`
        (one for the whole pack) or `nowhere`.
        """
        path = self.folder / f"sft_{channel_in}_{lines}.jsonl"
        if not path.exists():
            packs = sft_packs(lines, channel_in)
            path.write_text("".join(json.dumps(pack) + "\n" for pack in packs))
        return (
            "--sft", "--sft-tokenizer-prompt-format", "default", "--tokenizer-type", "SFTTokenizer",
            "--tokenizer-model", self.tokenizer(), "--no-create-attention-mask-in-dataloader",
            # 260 ids become 264 for any tensor-parallel size up to 4.
            "--make-vocab-size-divisible-by", "66",
            "--data-path", str(path), *SPLIT,
        )  # fmt: skip

    def tokenizer(self) -> str:
        """The folder of the tokenizer of the SFT sets."""
        from channel_metrics.demo.tiny import byte_tokenizer

        path = self.folder / "tokenizer"
        if not path.exists():
            byte_tokenizer().save_pretrained(str(path))
        return str(path)


def documents(count: int, low: int, high: int, *, seed: int) -> list[np.ndarray]:
    """`count` documents of 20 to 199 random ids and an end: int32 [length] each."""
    rng = np.random.default_rng(seed)
    bodies = [rng.integers(low, high, int(rng.integers(20, 200))) for _ in range(count)]
    return [np.append(body, END_OF_DOCUMENT).astype(np.int32) for body in bodies]


def write_indexed(prefix: Path, texts: list[np.ndarray]) -> None:
    """`prefix.bin` and `prefix.idx`, one sequence per document, ids as int32."""
    lengths = np.array([text.size for text in texts], dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * texts[0].itemsize
    bounds = np.arange(len(texts) + 1, dtype=np.int64)
    prefix.with_suffix(".bin").write_bytes(b"".join(text.tobytes() for text in texts))
    prefix.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, INT32_CODE, len(texts), len(bounds))
        + lengths.tobytes()
        + starts.astype(np.int64).tobytes()
        + bounds.tobytes()
    )


def sft_packs(count: int, channel_in: str) -> list[dict[str, object]]:
    rng = random.Random(0)
    packs: list[dict[str, object]] = []
    for _ in range(count):
        messages: list[dict[str, str]] = []
        for _ in range(rng.randint(2, 4)):
            channel = rng.choice(list(SOURCES))
            words = rng.choices(WORDS[7:9] if channel == "code" else WORDS, k=rng.randint(3, 12))
            system = {"role": "system", "content": channel}
            if channel_in == "message":
                system["channel"] = channel
            question = {"role": "user", "content": f"say {rng.choice(WORDS)}"}
            messages += [system, question, {"role": "assistant", "content": " ".join(words)}]
        pack: dict[str, object] = {"messages": messages}
        if channel_in == "line":
            pack["channel"] = rng.choice(list(SOURCES))
        packs.append(pack)
    return packs
