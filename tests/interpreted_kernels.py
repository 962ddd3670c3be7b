"""Losses of Triton kernels, run by Triton's interpreter on the CPU: a program for a test.

Prints JSON: {"backend, dtype": {what: largest difference to float64}}. A process of its own,
because Triton decides when a kernel is defined whether it will be interpreted.

cut-cross-entropy takes log1p from CUDA's libdevice, which the interpreter does not have: in its
place stands the same formula with `log`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from te_source import load_transformer_engine
from torch import Tensor

from channel_metrics.losses.linear import Backend, linear_cross_entropy


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def logaddexp(a: Any, b: Any) -> Any:
    largest = tl.maximum(a, b)
    return tl.log(1.0 + tl.exp(tl.minimum(a, b) - largest)) + largest


def measure(backend: Backend, dtype: torch.dtype) -> dict[str, float]:
    """Largest differences; `correct` is the share of tokens that agree."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, 32, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 32, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(40, (13,), generator=generator)
    target[:5:2] = -100
    # Some are right, so that correctness can differ.
    target[6:9] = (hidden @ weight.t()).argmax(-1)[6:9]
    loss, tokens = linear_cross_entropy(hidden, weight, target, reduction="mean", backend=backend)
    (loss * 0.25).backward()

    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    logits = exact[0] @ exact[1].t()
    expected = F.cross_entropy(logits, target)
    (expected * 0.25).backward()
    nll = F.cross_entropy(logits, target, reduction="none")
    counted = target != -100
    correct = (logits.argmax(-1) == target)[counted]
    assert tokens.correct is not None and 0 < int(correct.sum()) < len(correct)
    return {
        "loss": _difference(loss, expected),
        "nll": _difference(tokens.nll, nll),
        "hidden": _difference(hidden.grad, exact[0].grad),
        "weight": _difference(weight.grad, exact[1].grad),
        "correct": float((tokens.correct[counted] == correct).float().mean()),
    }


def _difference(ours: Any, expected: Any) -> float:
    found: Tensor = (ours.detach().double() - expected.detach()).abs().max()
    return float(found)


def main() -> None:
    results = {}
    if "liger" in sys.argv:
        results["liger"] = measure("liger", torch.float32)
    if "te" in sys.argv:
        load_transformer_engine()
        results["te"] = measure("te", torch.float32)
    if "cce" in sys.argv:
        from cut_cross_entropy import cce_lse_forward

        cce_lse_forward.tl_logaddexp = logaddexp
        # Its gradients are for 16 bits only.
        results["cce"] = measure("cce", torch.float16)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
