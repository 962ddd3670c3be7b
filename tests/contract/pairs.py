"""A sequence of the script as a pair: its tokens are the chosen answer, others the rejected one."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from contract.harness_hf import tiny_qwen2, token_ids
from contract.script import OneSequence

__all__ = [
    "BETA",
    "REFERENCE_SEED",
    "log_prob",
    "loss_of_pair",
    "pair_of",
]

BETA = 0.3
REFERENCE_SEED = 1


def pair_of(sequence: OneSequence) -> tuple[list[int], list[int], list[int]]:
    """The tokens of prompt, chosen and rejected answer."""
    first, *chosen = token_ids(sequence)
    other = OneSequence(sequence.channel, sequence.tokens + 1, sequence.number + 1000)
    return [first], chosen, token_ids(other)[1:]


def log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


@cache
def loss_of_pair(sequence: OneSequence) -> float:
    """DPO's loss of this pair alone, in float64."""
    model, reference = (tiny_qwen2(seed).double().eval() for seed in (0, REFERENCE_SEED))
    prompt, *answers = pair_of(sequence)
    chosen, rejected = (
        log_prob(model, prompt, answer) - log_prob(reference, prompt, answer) for answer in answers
    )
    return math.log1p(math.exp(BETA * (rejected - chosen)))
