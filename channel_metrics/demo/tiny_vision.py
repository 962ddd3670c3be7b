"""Tiny vision-language models with random weights, for runs without a download.

They have the layers, the processor and the token ids of the real Qwen2.5-VL and Qwen3-VL. Text is
tokenised into bytes. Making the processor needs torchvision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.errors import ConfigError
from channel_metrics.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["VISION_MODELS", "save_tiny_vision_model", "tiny_vision_model", "vision_tokenizer"]

# ms-swift knows the image token by this id, so the vocabulary must be as large as the real one.
_SPECIAL_TOKENS = {
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
_VOCAB_SIZE = 151_657
_WIDTH = 16

VISION_MODELS = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
"""{ms-swift's name of the model: the beginning of its class names in transformers}."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vision_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with Qwen's tokens for images, at their real ids."""
    transformers = need("transformers", extra="hf")
    from tokenizers import Tokenizer

    base = byte_tokenizer()
    backend = json.loads(base.backend_tokenizer.to_str())
    backend["model"]["vocab"] |= _SPECIAL_TOKENS
    model = Tokenizer.from_str(json.dumps(backend))
    model.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer: PreTrainedTokenizerFast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=base.pad_token,
        eos_token=base.eos_token,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_vision_model(kind: str, *, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A model of one of `VISION_MODELS` with random weights, the same for the same seed.

    Args:
        kind: `qwen2_5_vl` or `qwen3_vl`.
        seed: of the weights. The random state of the caller does not change.
        text: settings of the language model that replace the defaults here.
    """
    torch, transformers = need("torch", extra="hf"), need("transformers", extra="hf")
    if kind not in VISION_MODELS:
        raise ConfigError(f"kind must be one of {', '.join(VISION_MODELS)}, but is {kind!r}.")
    tokenizer, name = vision_tokenizer(), VISION_MODELS[kind]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    language = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": _WIDTH // 2,
        "rope_parameters": rope,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": _WIDTH,
        "num_heads": 2,
        "intermediate_size": 2 * _WIDTH,
    }
    vision |= {"out_hidden_size": _WIDTH, "initializer_range": 0.3}
    if kind == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(
        text_config=language | text, vision_config=vision, tie_word_embeddings=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return model


def save_tiny_vision_model(folder: Path, kind: str, **text: Any) -> Path:
    """Save a tiny model with its tokenizer and processor.

    Args:
        folder: where; returned.
        kind, text: as in `tiny_vision_model`.
    """
    transformers = need("transformers", extra="hf")
    tiny_vision_model(kind, **text).save_pretrained(folder)
    new, patch = kind == "qwen3_vl", 16 if kind == "qwen3_vl" else 14
    video = transformers.Qwen3VLVideoProcessor if new else transformers.Qwen2VLVideoProcessor
    processor = getattr(transformers, f"{VISION_MODELS[kind]}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=patch),
        tokenizer=vision_tokenizer(),
        video_processor=video(patch_size=patch),
        chat_template=_CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder
