"""The byte-level tokenizer and the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from channel_metrics.demo.tiny import TinyModel, byte_tokenizer, load_tokenizer, tiny_model
from channel_metrics.demo.tiny_vision import tiny_vision_model, vision_tokenizer
from channel_metrics.errors import ConfigError

TOKENIZER = byte_tokenizer()


@given(st.text(alphabet=st.characters(exclude_characters="<", exclude_categories=["Cs"])))
def test_ids_are_the_bytes_and_decode_to_the_text(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_special_tokens_follow_the_bytes() -> None:
    assert TOKENIZER("a<|im_end|>")["input_ids"] == [97, 259]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, len(TOKENIZER)) == (256, 257, 260)


def test_chat_template() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "à <|im_start|> b"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.chat_template == TOKENIZER.chat_template


def test_no_tokenizer_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_the_model_depends_on_the_seed_alone_and_leaves_the_random_numbers() -> None:
    size = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    state = torch.get_rng_state()
    models = [tiny_model(size, TOKENIZER, max_length=8, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (model.state_dict()["model.embed_tokens.weight"] for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (260, 16)


def test_a_vision_model_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of qwen2_5_vl, qwen3_vl, but is 'llava'"):
        tiny_vision_model("llava")


def test_the_vision_tokenizer_has_the_ids_of_qwen() -> None:
    tokenizer = vision_tokenizer()
    assert tokenizer("a<|image_pad|>b")["input_ids"] == [97, 151655, 98]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 259
