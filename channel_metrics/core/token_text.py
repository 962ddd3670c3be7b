"""Reads from a tokenizer how many bytes and characters of text each token stands for.

| decoder of the tokenizer | a token |
|---|---|
| byte-level (GPT-2, Qwen, Llama 3) | is bytes, each written as a printable character |
| SentencePiece (Metaspace, or `▁` replaced) | is text, with `▁` for a space |
| byte fallback beside it (Llama 2, Gemma) | may be one byte, `<0xE4>` |

A character may be spread over several tokens. It belongs to the token that holds its first byte.
SentencePiece puts a space before a text. It counts with the first token, though a decode drops it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from channel_metrics.core.text_sizes import TextSizes
from channel_metrics.errors import ConfigError

__all__ = ["text_sizes"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def text_sizes(tokenizer: Any) -> TextSizes:
    """The bytes and characters of each token.

    Special tokens and the token for unknown text have none. Tokens that were added to the
    vocabulary and are not special stand for their own text.

    Args:
        tokenizer: a fast tokenizer of transformers, or a processor that has one.

    Raises:
        ConfigError: the text of a single token cannot be told, as with WordPiece, or if the
            tokenizer is not a fast one.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            "bits_per_byte and bits_per_char need a fast tokenizer of transformers, but got "
            f"{type(tokenizer).__name__}; load it with use_fast=True, or leave these metrics out."
        )
    to_bytes = _decoder(json.loads(backend.to_str())["decoder"])
    added = tokenizer.added_tokens_decoder
    silent = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    vocabulary = tokenizer.get_vocab()
    texts = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index not in silent:
            texts[index] = added[index].content.encode() if index in added else to_bytes(token)
    # In UTF-8, a byte that goes on with a character is 10xxxxxx.
    begins = [sum(byte & 0xC0 != 0x80 for byte in text) for text in texts]
    lengths = [len(text) for text in texts]
    return TextSizes(
        torch.tensor(lengths, dtype=torch.int64, device="cpu"),
        torch.tensor(begins, dtype=torch.int64, device="cpu"),
    )


def _decoder(decoder: Any) -> Any:
    """The function from a token to its bytes."""
    parts = (decoder or {}).get("decoders", [decoder or {}])
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        bytes_of = _bytes_of_characters()
        return lambda token: bytes(bytes_of[character] for character in token)
    spaces = [part["replacement"] for part in parts if part.get("type") == "Metaspace"]
    spaces += [
        part["pattern"]["String"]
        for part in parts
        if part.get("type") == "Replace" and part["content"] == " " and "String" in part["pattern"]
    ]
    if not spaces:
        raise ConfigError(
            "bits_per_byte and bits_per_char need a tokenizer whose tokens say where spaces are "
            "(byte-level, or SentencePiece), but its decoder is "
            f"{', '.join(sorted(map(str, kinds)))}; leave these metrics out."
        )
    has_bytes = "ByteFallback" in kinds

    def to_bytes(token: str) -> bytes:
        match = _BYTE.fullmatch(token) if has_bytes else None
        return bytes([int(match[1], 16)]) if match else token.replace(spaces[0], " ").encode()

    return to_bytes


def _bytes_of_characters() -> dict[str, int]:
    """{character: byte} of byte-level tokenizers, which write each byte as a printable character.

    Printable bytes of Latin-1 stand for themselves; the others follow from code point 256 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}
