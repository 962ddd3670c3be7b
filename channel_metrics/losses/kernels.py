"""Token losses from the hidden states, by kernels of other packages.

Each function takes `HeadInputs`, and returns losses [T] and correctness [T]. The losses can be
differentiated, are float32 at least, and are 0 where the target is ignored.
"""

from __future__ import annotations

import importlib
import inspect
import re
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.losses.cross_entropy import HeadInputs

__all__ = [
    "cce_token_losses",
    "check_liger",
    "liger_losses_and_predictions",
    "liger_token_losses",
    "torch_token_losses",
]

_LIGER_VERSION = (0, 8, 2)


def torch_token_losses(head: HeadInputs) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.linear_cross_entropy`, in chunks.

    For bfloat16, torch returns losses in bfloat16, which have two to three digits.
    """
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise UnsupportedVersionError(
            f"backend 'torch' needs torch >= 2.13, but this is {torch.__version__}; use 'chunked'."
        )
    # Without options, torch computes all logits at once.
    options: Any = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=head.chunk_size)
    nll: Tensor = function(
        head.hidden,
        head.weight,
        head.target,
        linear_bias=head.bias,
        reduction="none",
        ignore_index=head.ignore_index,
        options=options,
    )
    return nll.to(torch.promote_types(nll.dtype, torch.float32)), head.correct()


def liger_token_losses(head: HeadInputs) -> tuple[Tensor, Tensor | None]:
    """Liger's fused loss; correctness comes with it."""
    check_liger("backend 'liger'", "use 'chunked'")
    nll, predicted = liger_losses_and_predictions(head)
    return nll, None if predicted is None else predicted == head.target


def liger_losses_and_predictions(head: HeadInputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Losses [T], and the ids [T] of the largest logits (None if correctness is not wanted).

    options: further arguments of `liger_fused_linear_cross_entropy`.
    """
    functional = importlib.import_module("liger_kernel.transformers.functional")
    found = functional.liger_fused_linear_cross_entropy(
        head.hidden,
        head.weight,
        head.target,
        bias=head.bias,
        ignore_index=head.ignore_index,
        reduction="none",
        return_predicted_tokens=head.with_correct,
        **options,
    )
    if isinstance(found, Tensor):
        return found, None
    return found.loss, found.predicted_tokens


def check_liger(user: str, instead: str) -> None:
    """Raise `UnsupportedVersionError` unless liger-kernel is installed, and new enough.

    user: who needs it. instead: what to do without it.
    """
    try:
        version = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        raise UnsupportedVersionError(
            f"{user} needs the package liger-kernel >= 0.8.2; install it, or {instead}."
        ) from None
    # A nightly of 0.8.2 is "0.8.2.dev2026...".
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _LIGER_VERSION:
        raise UnsupportedVersionError(
            f"{user} needs liger-kernel >= 0.8.2, but {version} is installed: its gradients for "
            f"losses of single tokens are wrong; upgrade it, or {instead}."
        )


def cce_token_losses(head: HeadInputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """cut-cross-entropy; correctness costs one more projection.

    options: further arguments of its `linear_cross_entropy`.
    """
    try:
        package = importlib.import_module("cut_cross_entropy")
    except ImportError:
        raise UnsupportedVersionError(
            "backend 'cce' needs the package cut-cross-entropy; install it, or use 'chunked'."
        ) from None
    if head.bias is not None:
        if "bias" not in inspect.signature(package.linear_cross_entropy).parameters:
            raise UnsupportedVersionError(
                "backend 'cce' needs a cut-cross-entropy with `bias` for a head with one (25.1.1 "
                "has none); install a newer one, or use 'chunked'."
            )
        options["bias"] = head.bias
    nll: Tensor = package.linear_cross_entropy(
        head.hidden,
        head.weight,
        head.target,
        ignore_index=head.ignore_index,
        reduction="none",
        **options,
    )
    return nll.to(torch.promote_types(nll.dtype, torch.float32)), head.correct()
