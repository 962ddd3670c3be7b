"""Small local stand-ins for what the tests of TRL and transformers load from the hub.

    python tests/upstream/stand_ins.py FOLDER

A test that runs in FOLDER finds `trl-internal-testing/zen` and the others there, as local folders.
The models have random weights; the texts are made up.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

OWNER = "trl-internal-testing"
WORDS = ("better", "than", "is", "complex", "flat", "explicit", "ugly", "nested", "sparse", "rules")
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
CAUSAL = {
    "tiny-Qwen2ForCausalLM-2.5": "qwen2",
    "tiny-Qwen3ForCausalLM": "qwen3",
    "tiny-LlamaForCausalLM-3.2": "llama",
    "tiny-MistralForCausalLM-0.2": "mistral",
    "tiny-GPTNeoXForCausalLM": "gpt_neox",
    "tiny-Cohere2ForCausalLM": "cohere2",
    "tiny-Gemma2ForCausalLM": "gemma2",
    "tiny-Glm4MoeForCausalLM": "glm4_moe",
    "tiny-GptOssForCausalLM": "gpt_oss",
    "tiny-Qwen3MoeForCausalLM": "qwen3_moe",
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 2}
EXTRA = {
    "gemma2": {"head_dim": 2},
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
}
CLASSIFIERS = {
    "tiny-Qwen2ForSequenceClassification-2.5": "qwen2",
    "tiny-Qwen3ForSequenceClassification": "qwen3",
    "tiny-LlamaForSequenceClassification-3.2": "llama",
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS = (
    "language_modeling",
    "prompt_only",
    "prompt_completion",
    "preference",
    "implicit_prompt_preference",
)
# {dataset: {config: (kind of record, conversational)}}
DATASETS = {
    "zen": {
        f"{name}_{kind}": (kind, name == "conversational")
        for name in ("standard", "conversational")
        for kind in KINDS
    },
    "toolcall": {kind: (kind, True) for kind in ("language_modeling", "preference")},
    "harmony": {kind: (kind, True) for kind in ("language_modeling", "prompt_completion")},
}
# Text, as in the dataset itself.
TOOLS = json.dumps([{"type": "function", "function": {"name": "look_up"}}])


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 6)))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level one, so that any text has tokens. Each of the words is one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        [*WORDS, *(f" {word}" for word in WORDS)],
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=TEMPLATE,
    )


def write_models(folder: Path) -> None:
    words = tokenizer()
    for names, factory in (
        (CAUSAL, AutoModelForCausalLM),
        (CLASSIFIERS, AutoModelForSequenceClassification),
    ):
        for name, kind in names.items():
            config = AutoConfig.for_model(
                kind,
                vocab_size=len(words),
                bos_token_id=None,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
                **SMALL,
                **EXTRA.get(kind, {}),
                **({"num_labels": 1} if factory is AutoModelForSequenceClassification else {}),
            )
            from_config: Any = factory.from_config
            model = from_config(config)
            model.save_pretrained(folder / OWNER / name)
            words.save_pretrained(folder / OWNER / name)


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def record(kind: str, conversational: bool, rng: random.Random) -> dict[str, Any]:
    """One record of TRL's dataset types."""

    def said(role: str) -> Any:
        return turn(role, text(rng)) if conversational else " " + text(rng)

    prompt, answer = said("user"), said("assistant")
    if kind == "language_modeling":
        return {"messages" if conversational else "text": prompt + answer}
    if kind == "prompt_only":
        return {"prompt": prompt}
    if kind == "prompt_completion":
        return {"prompt": prompt, "completion": answer}
    pair = {"chosen": answer, "rejected": said("assistant")}
    if kind == "preference":
        return {"prompt": prompt, **pair}
    return {key: prompt + value for key, value in pair.items()}


def write_data(folder: Path, channels: bool) -> None:
    """Datasets with 17 records for training and 2 for tests, of each type; with a column `channel`
    if they are to be measured."""
    for name, made in DATASETS.items():
        front = ["---", "configs:"]
        for config, (kind, conversational) in made.items():
            front += [f"- config_name: {config}", "  data_files:"]
            rng = random.Random(name + config)
            (folder / OWNER / name / config).mkdir(parents=True, exist_ok=True)
            for split, count in (("train", 17), ("test", 2)):
                lines = []
                for index in range(count):
                    one = record(kind, conversational, rng)
                    one |= {"tools": TOOLS} if name == "toolcall" else {}
                    one |= {"channel": ("aa", "bb")[index % 2]} if channels else {}
                    lines.append(json.dumps(one))
                path = f"{config}/{split}.jsonl"
                (folder / OWNER / name / path).write_text("\n".join(lines) + "\n")
                front += [f"  - split: {split}", f"    path: {path}"]
        (folder / OWNER / name / "README.md").write_text("\n".join([*front, "---", ""]))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_models(target)
    write_data(target, channels="--channels" in sys.argv)
