"""Token ids and labels of a record. The loss is on the assistant's words, or on a whole text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from channel_metrics.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "check_tokenizer", "encode"]

IGNORED = -100

Messages = Sequence[Mapping[str, str]]
Encoded = dict[str, list[int]]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> None:
    """Raise `ConfigError` unless `tokenizer` can pad and, for `chat`, find answers in a chat."""
    name = tokenizer.name_or_path or "byte"
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"tokenizer {name!r} has no pad token; save it with one.")
    if chat and not tokenizer.chat_template:
        raise ConfigError(
            f"tokenizer {name!r} has no chat template, but the sources hold messages; take the "
            "tokenizer of a chat model, or write the records as text."
        )
    if chat and not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {name!r} is a slow one and does not tell where in the text its tokens are, "
            "so the answers in messages cannot be found; use a fast tokenizer."
        )


def encode(
    record: Mapping[str, Any], *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """`input_ids` and `labels`, cut to `max_length`; a label of -100 is not learned."""
    if record.get("messages") is not None:
        encoded = _encode_messages(record["messages"], tokenizer)
    else:
        encoded = _encode_text(record["text"], tokenizer)
    return {key: values[:max_length] for key, values in encoded.items()}


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    ids: list[int] = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(end)
    return {"input_ids": ids, "labels": list(ids)}


def _encode_messages(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    text = _render(messages, tokenizer)
    spans = _answer_spans(messages, text, tokenizer)
    # The text already has the special tokens of the template.
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(tokens["input_ids"])
    labels = [
        token if any(first <= start < end <= last for first, last in spans) else IGNORED
        for token, (start, end) in zip(ids, tokens["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def _answer_spans(
    messages: Messages, text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Where each answer begins and ends in `text`, with its end mark."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(messages[:index], tokenizer, prompt=True) if index else ""
            through = _render(messages[: index + 1], tokenizer)
            if not (text.startswith(before) and text.startswith(through)):
                raise ConfigError(
                    f"tokenizer {tokenizer.name_or_path!r}: its chat template rewrites earlier "
                    f"turns (answer {index} of {len(messages)} messages), so the answers cannot "
                    "be found; use another template, or one answer per record."
                )
            spans.append((len(before), len(through.rstrip())))
    return spans


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False) -> str:
    return str(
        tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompt
        )
    )
