"""A sequence of the script as a pair: its tokens are the chosen answer, others the rejected one.

Or as a single answer for KTO: the chosen one if its number is even, else the rejected one.
The losses are computed for each pair or answer alone, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import Qwen2ForSequenceClassification

from channel_metrics.demo.tiny import byte_tokenizer
from contract.harness_hf import tiny_qwen2, token_ids
from contract.script import OneSequence

__all__ = [
    "BETA",
    "REFERENCE_SEED",
    "answer_of",
    "log_prob",
    "loss_of_answer",
    "loss_of_pair",
    "loss_of_rewards",
    "odds_loss",
    "padding_tokenizer",
    "pair_of",
    "preference_loss",
    "reward_model",
    "reward_of",
    "scores",
]

BETA = 0.3
REFERENCE_SEED = 1


def pair_of(sequence: OneSequence) -> tuple[list[int], list[int], list[int]]:
    """The tokens of prompt, chosen and rejected answer."""
    first, *chosen = token_ids(sequence)
    other = OneSequence(sequence.channel, sequence.tokens + 1, sequence.number + 1000)
    return [first], chosen, token_ids(other)[1:]


def answer_of(sequence: OneSequence) -> tuple[list[int], list[int], bool]:
    """The tokens of prompt and answer, and whether the answer is desirable."""
    prompt, *answers = pair_of(sequence)
    return prompt, answers[sequence.number % 2], sequence.number % 2 == 0


def padding_tokenizer() -> Any:
    """One that pads with 0: the tiny models know fewer tokens than the tokenizer."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def reward_model() -> Any:
    config = tiny_qwen2().config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(2)
    return Qwen2ForSequenceClassification(config)


def log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    of_answer = log_probs[range(len(prompt) - 1, len(prompt + answer) - 1), answer]
    return float(of_answer.double().sum())


@cache
def _of_answers(sequence: OneSequence, seed: int) -> list[float]:
    """The log probabilities of the chosen and of the rejected answer."""
    model = tiny_qwen2(seed).double().eval()
    prompt, *answers = pair_of(sequence)
    return [log_prob(model, prompt, answer) for answer in answers]


def _ratios(sequence: OneSequence) -> list[float]:
    of_both = zip(_of_answers(sequence, 0), _of_answers(sequence, REFERENCE_SEED), strict=True)
    return [ours - reference for ours, reference in of_both]


def loss_of_pair(sequence: OneSequence) -> float:
    """That of DPO."""
    chosen, rejected = _ratios(sequence)
    return _log_sigmoid_loss(BETA * (chosen - rejected))


def preference_loss(sequence: OneSequence) -> float:
    """That of CPO without nll."""
    chosen, rejected = _of_answers(sequence, 0)
    return _log_sigmoid_loss(BETA * (chosen - rejected))


def odds_loss(sequences: Sequence[OneSequence]) -> float:
    """That of ORPO: the mean of the pairs, and the nll per token of the chosen answers."""
    odds, nll, tokens = 0.0, 0.0, 0
    for sequence in sequences:
        _, *answers = pair_of(sequence)
        sums = _of_answers(sequence, 0)
        chosen, rejected = (total / len(a) for total, a in zip(sums, answers, strict=True))
        gap = math.log1p(-math.exp(chosen)) - math.log1p(-math.exp(rejected))
        odds += BETA * _log_sigmoid_loss(chosen - rejected - gap)
        nll, tokens = nll - sums[0], tokens + len(answers[0])
    return odds / len(sequences) + nll / tokens


def loss_of_answer(sequence: OneSequence) -> float:
    """That of KTO's `apo_zero_unpaired`, which no other answer of the batch changes."""
    desirable = sequence.number % 2 == 0
    gain = BETA * _ratios(sequence)[0 if desirable else 1]
    return 1 / (1 + math.exp(gain if desirable else -gain))


@cache
def loss_of_rewards(sequence: OneSequence) -> float:
    """That of a reward model."""
    model = reward_model().double().eval()
    prompt, *answers = pair_of(sequence)
    with torch.no_grad():
        rewards = [model(torch.tensor([prompt + answer])).logits.item() for answer in answers]
    return _log_sigmoid_loss(rewards[0] - rewards[1])


def _log_sigmoid_loss(gap: float) -> float:
    return math.log1p(math.exp(-gap))


def reward_of(number: int) -> float:
    """For GRPO: the reward of the completions of this prompt, whatever they are."""
    return number % 7 - 2.5


def scores(*completions: Any, number: list[int], **kwargs: Any) -> list[float]:
    return [reward_of(one) for one in number]
