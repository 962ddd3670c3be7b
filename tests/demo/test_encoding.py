"""Labels stand on the assistant's words, and on all of a plain text."""

from __future__ import annotations

import pytest

from channel_metrics.demo.encoding import check_tokenizer, encode
from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.errors import ConfigError

TOKENIZER = byte_tokenizer()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def learned(encoded: dict[str, list[int]]) -> str:
    return str(TOKENIZER.decode([label for label in encoded["labels"] if label != -100]))


def test_loss_on_every_answer_and_its_end() -> None:
    record = {
        "messages": [
            message("system", "Be brief."),
            message("user", "one?"),
            message("assistant", "Ünö"),
            message("user", "two?"),
            message("assistant", "dos  "),
        ]
    }
    encoded = encode(record, tokenizer=TOKENIZER, max_length=500)
    assert learned(encoded) == "Ünö<|im_end|>dos  <|im_end|>"
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    assert str(TOKENIZER.decode(encoded["input_ids"])).startswith("<|im_start|>system\nBe brief.")


def test_loss_on_all_of_a_text_and_its_end() -> None:
    encoded = encode({"text": "abc", "messages": None}, tokenizer=TOKENIZER, max_length=9)
    assert encoded == {"input_ids": [97, 98, 99, 257], "labels": [97, 98, 99, 257]}


def test_cut_to_max_length() -> None:
    encoded = encode({"text": "abc"}, tokenizer=TOKENIZER, max_length=2)
    assert encoded == {"input_ids": [97, 98], "labels": [97, 98]}


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    record = {"messages": [message("user", "a"), message("assistant", "b"), message("user", "c")]}
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        encode(record, tokenizer=tokenizer, max_length=99)


def test_tokenizers_that_cannot_do_it_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    check_tokenizer(tokenizer, chat=False)
    with pytest.raises(ConfigError, match="no chat template"):
        check_tokenizer(tokenizer, chat=True)
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no pad token"):
        check_tokenizer(tokenizer, chat=False)
