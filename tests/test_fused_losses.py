"""Losses by kernels of others: Triton ones under its interpreter, vocab-parallel ones on ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_ranks
from torch import Tensor

from channel_metrics.linear_losses import Backend, linear_cross_entropy

PROGRAM = Path(__file__).parent / "interpreted_kernels.py"
INSTALLED = [name for name in ("liger_kernel", "cut_cross_entropy") if util.find_spec(name)]
TRITON = util.find_spec("triton") is not None


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    backends = [{"liger_kernel": "liger", "cut_cross_entropy": "cce"}[name] for name in INSTALLED]
    command = [sys.executable, str(PROGRAM), *backends]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(
    not TRITON or "liger_kernel" not in INSTALLED,
    reason="triton (for Linux only) and liger-kernel are not installed",
)
def test_liger_under_the_interpreter(interpreted: dict[str, dict[str, float]]) -> None:
    found = interpreted["liger"]
    assert found.pop("correct") == 1
    assert max(found.values()) < 1e-5, found


@pytest.mark.skipif(
    not TRITON or "cut_cross_entropy" not in INSTALLED,
    reason="cut-cross-entropy is in the latest environment, which `make test-latest` runs",
)
def test_cut_cross_entropy_under_the_interpreter(
    interpreted: dict[str, dict[str, float]],
) -> None:
    """In float16, which holds the logits to 1e-2 and these gradients to 1e-4."""
    found = interpreted["cce"]
    assert found.pop("correct") == 1
    assert max(found["loss"], found["nll"]) < 1e-2 and found["nll"] > 0, found
    assert max(found["hidden"], found["weight"]) < 2e-4, found


SIZE, HIDDEN, VOCABULARY = 11, 8, 12


def _split_head(backend: Backend) -> dict[str, Tensor | None]:
    """On one of two ranks: half of the vocabulary."""
    hidden, weight, bias, target = _whole_head()
    if backend == "te":
        _install_transformer_engine()
    rows = slice(dist.get_rank() * VOCABULARY // 2, (dist.get_rank() + 1) * VOCABULARY // 2)
    mine = [value.detach().clone().requires_grad_() for value in (hidden, weight[rows], bias[rows])]
    loss, tokens = linear_cross_entropy(
        mine[0],
        mine[1],
        target,
        bias=mine[2],
        reduction="mean",
        backend=backend,
        group=dist.group.WORLD,
    )
    loss.backward()
    found = {"loss": loss.detach(), "nll": tokens.nll, "correct": tokens.correct}
    grads = zip(("hidden", "weight", "bias"), mine, strict=True)
    return found | {name: leaf.grad for name, leaf in grads}


def _whole_head() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((SIZE, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    hidden, weight, bias = (torch.randn(*size, generator=generator) for size in sizes)
    target = torch.randint(VOCABULARY, (SIZE,), generator=generator)
    target[::4] = -100
    target[5] = (hidden @ weight.t() + bias).argmax(-1)[5]
    return [hidden, weight, bias, target]


def _install_transformer_engine() -> None:
    """A stand-in with the documented signature, and what its docs say it does.

    Not its kernel: that needs a GPU. Like the kernel, it overwrites the logits by their gradient,
    and returns losses [S, B].
    """

    class ParallelLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, target: Tensor, group: Any) -> Tensor:
            shape = [*target.shape, -1]
            parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, logits.contiguous(), group=group)
            whole = torch.cat(parts, -1)
            first = dist.get_rank(group) * logits.shape[-1]
            slope = whole.softmax(-1)
            wanted = target.clamp(min=0).unsqueeze(-1)
            slope.scatter_add_(-1, wanted, -torch.ones_like(wanted, dtype=slope.dtype))
            slope = slope * (target != -100).unsqueeze(-1)
            logits.copy_(slope[..., first : first + logits.shape[-1]])
            ctx.save_for_backward(logits)
            nll = -whole.log_softmax(-1).gather(-1, wanted).view(*shape[:-1])
            return nll.masked_fill(target == -100, 0)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
            return ctx.saved_tensors[0] * grad.unsqueeze(-1), None, None

    def parallel_cross_entropy(
        _input: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        reduce_loss: bool = False,
        dist_process_group: Any = None,
    ) -> Tensor:
        assert _input.dim() == 3 and target.shape == _input.shape[:2]
        assert label_smoothing == 0 and not reduce_loss
        loss: Tensor = ParallelLoss.apply(_input, target, dist_process_group)
        return loss

    for name in ("", ".pytorch", ".pytorch.cross_entropy"):
        sys.modules[f"transformer_engine{name}"] = ModuleType(f"transformer_engine{name}")
    sys.modules["transformer_engine.pytorch.cross_entropy"].__dict__.update(
        parallel_cross_entropy=parallel_cross_entropy
    )


@pytest.mark.parametrize("backend", ["megatron", "te"])
def test_a_vocabulary_split_over_two_ranks(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron's own fused kernel, and the contract of transformer-engine's (a stand-in)."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # its pieces, uncompiled: same formulas
    hidden, weight, bias, target = _whole_head()
    leaves = [value.double().requires_grad_() for value in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    loss = F.cross_entropy(logits, target)
    loss.backward()
    nll = F.cross_entropy(logits, target, reduction="none")
    correct, counted = logits.argmax(-1) == target, target != -100
    assert 0 < int(correct[counted].sum()) < int(counted.sum())

    ranks = run_ranks(_split_head, 2, backend)
    # Megatron rounds the gradient of the logits to bfloat16: eight bits.
    within = 3e-3 if backend == "megatron" else 1e-5
    for found in ranks:
        torch.testing.assert_close(found["loss"].double(), loss.detach())
        torch.testing.assert_close(found["nll"].double(), nll.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(found["correct"][counted], correct[counted])
        torch.testing.assert_close(found["hidden"].double(), leaves[0].grad, rtol=0, atol=within)
    for name, leaf in (("weight", leaves[1]), ("bias", leaves[2])):
        whole = torch.cat([found[name] for found in ranks])
        torch.testing.assert_close(whole.double(), leaf.grad, rtol=0, atol=within)
