"""What a run may be asked for beside its log, see `megatron_lm.observe`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron_lm import windows
from megatron_lm.observe import Result, checksum


def micro_batches() -> Result:
    """As `windows.micro_batches`."""
    from megatron.bridge.training import eval as evaluation

    return windows.recorded(evaluation)


def training() -> Result:
    """The bits of losses and gradient norms per iteration, of the weights at the end, and of the
    random numbers to come."""
    from megatron.bridge.training import pretrain, train

    log, setup, seen, models = train.training_log, pretrain.setup, [], []

    @functools.wraps(log)
    def training_log(losses: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({name: float(value).hex() for name, value in losses.items()})
        return log(losses, *args, **kwargs)

    @functools.wraps(setup)
    def remembering(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        models.extend(result.model)
        return result

    train.training_log, pretrain.setup = training_log, remembering
    return lambda: {
        "losses": seen,
        "weights": [checksum(p) for model in models for p in model.parameters()],
        "random": checksum(torch.get_rng_state()),
    }


def sft_tokens() -> Result:
    """The supervised tokens of all micro-batches of training: [[label, loss], ...] of each row.

    For one pipeline stage, whose loss function runs right after the model.
    """
    from megatron.bridge.training import gpt_step
    from megatron.core.models.common.language_module.language_module import LanguageModule

    compute, loss_func = LanguageModule.compute_language_model_loss, gpt_step.masked_next_token_loss
    labels: list[Any] = []
    found: list[Any] = []

    @functools.wraps(compute)
    def remembering(self: Any, given: Any, logits: Any) -> Any:
        labels[:] = given.tolist()
        return compute(self, given, logits)

    @functools.wraps(loss_func)
    def recording(mask: Any, losses: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            rows = zip(labels, losses.tolist(), mask.tolist(), strict=True)
            found.append(
                [[t for *t, m in zip(*row, strict=True) if m] for row in rows]  # [label, loss]
            )
        return loss_func(mask, losses, *args, **kwargs)

    LanguageModule.compute_language_model_loss = remembering
    gpt_step.masked_next_token_loss = recording
    return lambda: found
