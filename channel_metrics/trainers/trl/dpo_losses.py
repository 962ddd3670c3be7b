"""TRL's DPO losses, each as a function of the rewards of one pair.

TRL's reward is beta times the log ratio: log p(answer) of the model, minus that of the reference.
The formulas are those of trl 1.16. They give one loss per pair, where TRL logs only the mean.

`aot`, `aot_unpaired` and `sft` are missing: TRL computes them over the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["FORMULAS", "Pairs"]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """N pairs, and the options of DPOConfig that the losses use; each tensor is [N]."""

    chosen: Tensor
    """Rewards of the chosen answers."""
    rejected: Tensor
    """Rewards of the rejected answers."""
    chosen_length: Tensor
    """Tokens of the chosen answers, at least 1."""
    rejected_length: Tensor
    """Tokens of the rejected answers, at least 1."""
    beta: float
    label_smoothing: float
    discopop_tau: float
    f_divergence_type: str
    f_alpha_divergence_coef: float

    def score(self, rewards: Tensor) -> Tensor:
        """f'(ratio) of TRL's f-divergence; the log ratio itself for `reverse_kl`."""
        log_ratio, alpha = rewards / self.beta, self.f_alpha_divergence_coef - 1
        if self.f_divergence_type == "forward_kl":
            return 1 - torch.exp(-log_ratio)
        if self.f_divergence_type == "js_divergence":
            return math.log(2) + logsigmoid(log_ratio)
        if self.f_divergence_type == "alpha_divergence" and abs(alpha) >= 1e-6:
            # TRL's own limit, so that exp stays finite.
            largest = 11.0 if rewards.dtype == torch.float16 else 80.0
            powers = torch.exp((alpha * log_ratio).float().clamp(max=largest))
            return (powers - 1).to(rewards.dtype) / alpha
        return log_ratio

    @property
    def logits(self) -> Tensor:
        """beta times the difference of the scores; the margin for `reverse_kl`."""
        return self.beta * (self.score(self.chosen) - self.score(self.rejected))

    @property
    def gap_per_token(self) -> Tensor:
        """The difference of the scores, each divided by the tokens of its answer."""
        chosen = self.score(self.chosen) / self.chosen_length
        return chosen - self.score(self.rejected) / self.rejected_length


def _sigmoid(pairs: Pairs) -> Tensor:
    return -logsigmoid(pairs.logits)


def _sigmoid_norm(pairs: Pairs) -> Tensor:
    return -logsigmoid(pairs.beta * pairs.gap_per_token)


def _hinge(pairs: Pairs) -> Tensor:
    return torch.relu(1 - pairs.logits)


def _ipo(pairs: Pairs) -> Tensor:
    return (pairs.gap_per_token - 1 / (2 * pairs.beta)) ** 2


def _exo_pair(pairs: Pairs) -> Tensor:
    logits, flipped = pairs.logits, pairs.label_smoothing
    won = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-flipped))
    return won + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(flipped))


def _nca_pair(pairs: Pairs) -> Tensor:
    both = logsigmoid(-pairs.chosen) + logsigmoid(-pairs.rejected)
    return -logsigmoid(pairs.chosen) - 0.5 * both


def _robust(pairs: Pairs) -> Tensor:
    logits, flipped = pairs.logits, pairs.label_smoothing
    clean, other = (1 - flipped) * logsigmoid(logits), flipped * logsigmoid(-logits)
    return (other - clean) / (1 - 2 * flipped)


def _bco_pair(pairs: Pairs) -> Tensor:
    return -logsigmoid(pairs.chosen) - logsigmoid(-pairs.rejected)


def _sppo_hard(pairs: Pairs) -> Tensor:
    chosen, rejected = pairs.chosen / pairs.beta, pairs.rejected / pairs.beta
    return (chosen - 0.5 / pairs.beta) ** 2 + (rejected + 0.5 / pairs.beta) ** 2


def _apo_zero(pairs: Pairs) -> Tensor:
    return 1 - torch.sigmoid(pairs.chosen) + torch.sigmoid(pairs.rejected)


def _apo_down(pairs: Pairs) -> Tensor:
    return torch.sigmoid(pairs.chosen) + 1 - torch.sigmoid(pairs.chosen - pairs.rejected)


def _discopop(pairs: Pairs) -> Tensor:
    logits = pairs.logits
    share = torch.sigmoid(logits / pairs.discopop_tau)
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


FORMULAS: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}
"""{TRL's name of the loss: its value for each pair, [N]}."""
