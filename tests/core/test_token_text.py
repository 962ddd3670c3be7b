"""Bytes and characters per token, against a decode of the supervised text, for real tokenizers."""

from __future__ import annotations

import json
import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from channel_metrics import ChannelMetrics, ConfigError, MetricsConfig, MicroBatch
from channel_metrics.core.token_text import text_sizes

WORDS = [
    *("the", "quick", "brown", "fox", "über", "naïve", "東京", "大学", "привет", "мир"),
    *("🙂🚀", "x=1;", "é", "ñ", "▁", "<0x41>", "\t\n"),
]
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "über naïve 東京 привет",
    "x = 1;\n\ty",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ("byte_level", "sentencepiece", "byte_fallback")


def _trained(kind: str) -> Tokenizer:
    if kind == "byte_level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif kind == "sentencepiece":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        # The bytes are in the vocabulary, as in Llama's.
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL)
    backend.train_from_iterator(CORPUS, trainer)
    if kind == "byte_fallback":
        backend = _with_bytes(backend)
    return backend


def _with_bytes(backend: Tokenizer) -> Tokenizer:
    state = json.loads(backend.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    return Tokenizer.from_str(json.dumps(state))


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=_trained(kind), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return made


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    found = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_bits_per_byte_are_those_of_a_naive_decode(kind: str) -> None:
    """Each sample is a prompt and supervised text. Its text is what the decode of all tokens has
    beyond that of the prompt; losses are 1 nat per token, and special tokens do not count."""
    tokenizer = tokenizer_of(kind)
    metrics = ChannelMetrics(MetricsConfig(metrics=("bits_per_byte", "bits_per_char")))
    metrics.read_tokenizer(tokenizer)
    rng = random.Random(3)
    counts, num_bytes, num_chars = [0, 0], [0, 0], [0, 0]
    for number in range(60):
        words = [rng.choice(_known(kind)) for _ in range(12)]
        prompt = tokenizer.encode(" ".join(words[:4]), add_special_tokens=False)
        ids = tokenizer.encode(" ".join(words) + "<tool_call> x", add_special_tokens=False)
        if ids[: len(prompt)] != prompt:
            continue
        ids = [*ids, tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
        text = decoded(tokenizer, ids)
        before = decoded(tokenizer, prompt)
        assert text.startswith(before) and "\ufffd" not in text and "<unk>" not in text
        channel = number % 2
        num_bytes[channel] += len(text.encode()) - len(before.encode())
        num_chars[channel] += len(text) - len(before)
        counts[channel] += len(ids) - len(prompt) - 2
        labels = torch.tensor([[*[-100] * len(prompt), *ids[len(prompt) :]]])
        metrics.count(
            MicroBatch(
                token_losses=torch.ones(labels.shape), channels=["ab"[channel]], labels=labels
            )
        )
    assert min(counts) > 100
    values = metrics.close(1).values
    for channel, name in enumerate("ab"):
        bits = counts[channel] / math.log(2)
        assert values[name]["bits_per_byte"] == pytest.approx(bits / num_bytes[channel])
        assert values[name]["bits_per_char"] == pytest.approx(bits / num_chars[channel])


@pytest.mark.parametrize("kind", KINDS)
def test_supervised_text_of_several_turns(kind: str) -> None:
    """Turns of a user and of an assistant, whose text and end are supervised. The text of a turn
    is what the decode of all tokens up to its end has beyond that up to its begin."""
    tokenizer, rng, name = tokenizer_of(kind), random.Random(5), "a"
    metrics = ChannelMetrics(MetricsConfig(metrics=("bits_per_byte", "bits_per_char", "tokens")))
    metrics.read_tokenizer(tokenizer)
    end: int = tokenizer.get_vocab()["<|im_end|>"]
    losses_of_text: list[float] = []
    num_bytes = num_chars = num_tokens = 0
    for _ in range(20):
        ids: list[int] = []
        labels: list[int] = []
        losses: list[float] = []
        texts: list[str] = []
        for number in range(2 * rng.randint(1, 4)):
            words = " ".join(rng.choice(_known(kind)) for _ in range(5))
            turn = tokenizer.encode(words, add_special_tokens=False)
            before, ids = decoded(tokenizer, ids), [*ids, *turn, end]
            after = decoded(tokenizer, ids)
            assert after.startswith(before) and "\ufffd" not in after and len(after) > len(before)
            own = [rng.uniform(0, 4) for _ in turn]
            losses += [*own, 50.0]
            if number % 2:
                texts.append(after[len(before) :])
                losses_of_text += own
                labels += [*turn, end]
            else:
                labels += [-100] * (len(turn) + 1)
        num_bytes += sum(len(text.encode()) for text in texts)
        num_chars += sum(map(len, texts))
        num_tokens += sum(label != -100 for label in labels)
        metrics.count(
            MicroBatch(
                token_losses=torch.tensor([losses], dtype=torch.float64),
                channels=[name],
                labels=torch.tensor([labels]),
            )
        )
    bits = math.fsum(losses_of_text) / math.log(2)
    assert metrics.close(1).values[name] == pytest.approx(
        {
            "bits_per_byte": bits / num_bytes,
            "bits_per_char": bits / num_chars,
            "tokens": num_tokens,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_space_before_a_text_counts(kind: str) -> None:
    """If all of a text is supervised: SentencePiece writes a space that the decode drops."""
    tokenizer = tokenizer_of(kind)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("the quick", add_special_tokens=False)]
    assert decoded(tokenizer, ids) == "the quick"
    num_bytes, num_chars = (
        int(sizes.sum()) for sizes in text_sizes(tokenizer).of(torch.tensor(ids))
    )
    assert num_bytes == num_chars == len("the quick") + (kind != "byte_level")


def _known(kind: str) -> list[str]:
    """Words that the tokenizer can write; only one of the kinds has tokens for all bytes."""
    tokenizer = tokenizer_of(kind)
    return [
        word
        for word in WORDS
        if word and tokenizer.unk_token_id not in tokenizer.encode(word, add_special_tokens=False)
    ]


def test_the_kinds_are_those_they_are_named_after() -> None:
    texts = {kind: _known(kind) for kind in KINDS}
    assert "🙂🚀" in texts["byte_level"] and "🙂🚀" in texts["byte_fallback"]
    assert "🙂🚀" not in texts["sentencepiece"]
    pieces = tokenizer_of("byte_fallback").tokenize("🙂")
    assert "<0xF0>" in pieces


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_unknown_tokens_have_no_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    sizes = text_sizes(tokenizer)
    assert len(sizes.num_bytes) == len(tokenizer)
    for token in (*SPECIAL, "<|im_end|>"):
        assert sizes.num_bytes[tokenizer.convert_tokens_to_ids(token)] == 0
    assert sizes.num_bytes[tokenizer.convert_tokens_to_ids("<tool_call>")] == len("<tool_call>")
    assert (
        sizes.of(torch.tensor([len(tokenizer), len(tokenizer) + 99, -100]))[0].tolist() == [0] * 3
    )


def test_a_tokenizer_that_hides_spaces_is_refused() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="its decoder is WordPiece"):
        text_sizes(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ConfigError, match="need a fast tokenizer"):
        text_sizes(object())


def test_without_tokenizer_or_labels_they_are_absent_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = ChannelMetrics(MetricsConfig(metrics=("loss", "bits_per_byte")))
    batch = MicroBatch(token_losses=torch.ones(1, 3), channels=["a"])
    for _ in range(2):
        metrics.count(batch)
    metrics.read_tokenizer(tokenizer_of("byte_level"))
    for _ in range(2):
        metrics.count(batch)
    assert metrics.close(1).logs == {"a_loss": 1.0}
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "bits_per_byte and bits_per_char need a tokenizer",
        "bits_per_byte and bits_per_char need the labels",
    ]


def test_off_reads_no_tokenizer() -> None:
    metrics = ChannelMetrics(MetricsConfig())
    metrics.read_tokenizer(object())
    assert metrics.text_sizes is None and not metrics.with_targets
