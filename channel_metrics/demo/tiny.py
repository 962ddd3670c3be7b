"""A byte-level tokenizer and a tiny Qwen2 model, for runs without a download.

>>> tokenizer = byte_tokenizer()
>>> tokenizer("ab")["input_ids"]
[97, 98]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from channel_metrics.errors import ConfigError
from channel_metrics.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2ForCausalLM

__all__ = ["TinyModel", "byte_tokenizer", "load_tokenizer", "tiny_model"]

_SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """The size of a randomly initialised Qwen2 model."""

    hidden_size: int = 128
    """Width; divisible by num_heads."""

    num_layers: int = 2
    """Transformer blocks."""

    num_heads: int = 4
    """Attention heads, each with keys and values of its own."""

    intermediate_size: int = 352
    """Width of the MLP."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of the UTF-8 text, then four special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers = need("transformers", extra="hf")
    vocab = {char: byte for byte, char in enumerate(_byte_chars())}
    vocab |= {token: 256 + i for i, token in enumerate(_SPECIAL_TOKENS)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    pad, end_of_text, *rest = _SPECIAL_TOKENS
    backend.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer: PreTrainedTokenizerFast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=end_of_text,
        additional_special_tokens=rest,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer `name`: a name on the hub, a folder, or `byte`."""
    transformers = need("transformers", extra="hf")
    if name == "byte":
        return byte_tokenizer()
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer could be loaded from {name!r}: {error}") from error
    return tokenizer


def tiny_model(
    size: TinyModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int
) -> Qwen2ForCausalLM:
    """A Qwen2 model for `tokenizer` with random weights, the same for the same seed."""
    torch, transformers = need("torch", extra="hf"), need("transformers", extra="hf")
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    # Building the model must not change the random state of the caller.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Qwen2ForCausalLM = transformers.Qwen2ForCausalLM(config)
    return model


def _byte_chars() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    code = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(rest)}
    return [chr(code[byte]) for byte in range(256)]
