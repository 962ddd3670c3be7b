"""Losses by kernels of others: Triton ones under its interpreter, vocab-parallel ones on ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fork_client import Preload
from paths import TESTS
from rank_cases import Case, RanksOf, case
from te_source import SOURCES
from torch import Tensor

from channel_metrics.losses.linear import Backend, linear_cross_entropy

PROGRAM = TESTS / "interpreted_kernels.py"
INSTALLED = [name for name in ("liger_kernel", "cut_cross_entropy") if util.find_spec(name)]
TRITON = util.find_spec("triton") is not None
needs_te = pytest.mark.skipif(
    not TRITON or not (SOURCES / "transformer_engine").exists(),
    reason="it needs triton, for Linux only, and sources that `make env` lays beside; CI runs it",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    backends = [{"liger_kernel": "liger", "cut_cross_entropy": "cce"}[name] for name in INSTALLED]
    if (SOURCES / "transformer_engine").exists():
        backends.append("te")
    command = [sys.executable, str(PROGRAM), *backends]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(
    not TRITON or "liger_kernel" not in INSTALLED,
    reason="it needs liger-kernel and triton, which are for Linux: `make test` there runs this",
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


@needs_te
def test_transformer_engine_under_the_interpreter(
    interpreted: dict[str, dict[str, float]],
) -> None:
    found = interpreted["te"]
    assert found.pop("correct") == 1
    assert max(found.values()) < 1e-5, found


SIZE, HIDDEN, VOCABULARY = 11, 8, 12
# Megatron's pieces, uncompiled: the same formulas. Triton is asked when it is imported.
ENVIRON = (("TORCHDYNAMO_DISABLE", "1"), ("TRITON_INTERPRET", "1"))


@case(Preload(("channel_metrics",), ENVIRON), ranks=2)
def megatron(folder: Path) -> dict[str, Tensor | None]:
    return _split_head("megatron")


@case(Preload(("te_source:load_transformer_engine",), ENVIRON), ranks=2)
def te(folder: Path) -> dict[str, Tensor | None]:
    return _split_head("te")


def _split_head(backend: Backend) -> dict[str, Tensor | None]:
    """On one of two ranks: half of the vocabulary."""
    hidden, weight, bias, target = _whole_head()
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


# Megatron rounds the gradient of the logits to bfloat16: eight bits.
@pytest.mark.parametrize(
    ("of", "within"),
    [pytest.param(megatron, 3e-3, id="megatron"), pytest.param(te, 1e-5, marks=needs_te, id="te")],
)
def test_a_vocabulary_split_over_two_ranks(ranks_of: RanksOf, of: Case, within: float) -> None:
    """The fused kernels of Megatron and of transformer-engine, on two processes."""
    hidden, weight, bias, target = _whole_head()
    leaves = [value.double().requires_grad_() for value in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    loss = F.cross_entropy(logits, target)
    loss.backward()
    nll = F.cross_entropy(logits, target, reduction="none")
    correct, counted = logits.argmax(-1) == target, target != -100
    assert 0 < int(correct[counted].sum()) < int(counted.sum())

    ranks = ranks_of(of)
    for found in ranks:
        torch.testing.assert_close(found["loss"].double(), loss.detach())
        torch.testing.assert_close(found["nll"].double(), nll.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(found["correct"][counted], correct[counted])
        torch.testing.assert_close(found["hidden"].double(), leaves[0].grad, rtol=0, atol=within)
    for name, leaf in (("weight", leaves[1]), ("bias", leaves[2])):
        whole = torch.cat([found[name] for found in ranks])
        torch.testing.assert_close(whole.double(), leaf.grad, rtol=0, atol=within)
