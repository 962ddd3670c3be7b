"""Losses from hidden states against the logits: values, gradients, correctness, and memory."""

from __future__ import annotations

import sys
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from channel_metrics.errors import ConfigError, UnsupportedVersionError
from channel_metrics.losses.chunked import chunked_cross_entropy
from channel_metrics.losses.cross_entropy import HeadInputs
from channel_metrics.losses.linear import Backend, linear_cross_entropy

ON_CPU = ["logits", "chunked", "torch"]
SIZES = [(1, 8, 5), (7, 16, 33), (64, 24, 131), (65, 8, 17)]


def make(
    num_tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, bias: bool
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    target = torch.randint(vocabulary, (num_tokens,), generator=generator)
    target[::3] = -100
    if num_tokens == 1:
        target[0] = 2
    head_bias = random(vocabulary) if bias else None
    return [random(num_tokens, hidden), random(vocabulary, hidden), head_bias, target]


def reference(
    given: list[Any], reduction: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """In float64, from the logits."""
    leaves = [None if v is None else v.detach().double().requires_grad_() for v in given[:3]]
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    logits = F.linear(hidden, weight, bias)
    loss = F.cross_entropy(logits, given[3], reduction=reduction)
    (loss * scale).backward()
    grads = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    nll = F.cross_entropy(logits, given[3], reduction="none")
    return loss.detach(), nll.detach(), logits.argmax(-1) == given[3], grads


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_equals_the_reference(
    backend: Backend, size: tuple[int, int, int], bias: bool, reduction: str
) -> None:
    given = make(*size, torch.float32, bias)
    hidden, weight, head_bias, target = given
    assert hidden is not None and weight is not None and target is not None
    loss, tokens = linear_cross_entropy(
        hidden,
        weight,
        target,
        reduction=reduction,
        backend=backend,
        bias=head_bias,
        chunk_size=16,
    )
    (loss * 0.25).backward()
    expected_loss, nll, correct, grads = reference(given, reduction, 0.25)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(loss.detach().double(), expected_loss)
    close(tokens.nll.double(), nll)
    assert tokens.nll[target == -100].eq(0).all()
    assert tokens.correct is not None
    counted = target != -100
    assert torch.equal(tokens.correct[counted], correct[counted])
    assert tokens.reported_sum.item() == pytest.approx(nll.sum().item(), rel=1e-4)
    assert not tokens.nll.requires_grad
    leaves = [leaf for leaf in (hidden, weight, head_bias) if leaf is not None]
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.grad is not None
        close(leaf.grad.double(), grad)


@pytest.mark.parametrize("backend", ["logits", "chunked"])
def test_bfloat16_is_as_near_as_the_models_own_loss(backend: Backend) -> None:
    """The error of the gradients is that of bfloat16 logits, no more than twice over."""
    given = make(64, 24, 131, torch.bfloat16, False)
    hidden, weight, _, target = given
    assert hidden is not None and weight is not None and target is not None
    exact = reference(given, "sum", 1.0)[3]

    def errors(loss: Tensor) -> list[float]:
        grads = torch.autograd.grad(loss, [hidden, weight])
        return [float((g - e).abs().max()) for g, e in zip(grads, exact, strict=True)]

    own = errors(F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum"))
    loss, tokens = linear_cross_entropy(hidden, weight, target, reduction="sum", backend=backend)
    assert all(ours <= 2 * theirs for ours, theirs in zip(errors(loss), own, strict=True))
    if backend == "chunked":
        assert tokens.nll.dtype == torch.float32


def test_chunks_do_not_matter_and_nothing_is_kept_without_gradients() -> None:
    hidden, weight, _, target = make(64, 24, 131, torch.float32, False)
    assert hidden is not None and weight is not None and target is not None
    found = [
        linear_cross_entropy(hidden, weight, target, reduction="mean", chunk_size=size)
        for size in (1, 7, 64, 1000)
    ]
    for loss, tokens in found:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(tokens.nll, found[0][1].nll)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, target, reduction="sum")
    assert not loss.requires_grad
    frozen = weight.detach()
    loss, _ = linear_cross_entropy(hidden, frozen, target, reduction="sum")
    loss.backward()
    assert hidden.grad is not None and frozen.grad is None


def test_no_tokens() -> None:
    hidden, weight = torch.empty(0, 4, requires_grad=True), torch.ones(3, 4)
    target = torch.empty(0, dtype=torch.int64)
    loss, tokens = linear_cross_entropy(hidden, weight, target, reduction="sum")
    loss.backward()
    assert (loss.item(), tokens.nll.shape) == (0, (0,))


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return found


@pytest.mark.parametrize(
    ("backend", "whole"),
    [("logits", True), ("chunked", False), ("torch", False)],
)
def test_the_logits_never_exist(backend: Backend, whole: bool) -> None:
    hidden, weight, _, target = make(64, 8, 512, torch.float32, False)
    assert hidden is not None and weight is not None and target is not None
    with Largest() as largest:
        linear_cross_entropy(
            hidden, weight, target, reduction="sum", backend=backend, chunk_size=8
        )[0].backward()
    assert (largest.numel >= 64 * 512) == whole
    assert largest.numel >= 8 * 512


def test_refuses() -> None:
    ones, target = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match=r"backend must be one of .* but is 'fast'"):
        linear_cross_entropy(ones, ones, target, reduction="sum", backend=cast(Any, "fast"))
    with pytest.raises(ConfigError, match="reduction must be 'sum' or 'mean', but is 'none'"):
        linear_cross_entropy(ones, ones, target, reduction="none")
    with pytest.raises(
        ConfigError, match=r"have the shapes \[1, 2, 3\], \[2, 3\] and \[2\]; flatten"
    ):
        linear_cross_entropy(ones[None], ones, target, reduction="sum")
    with pytest.raises(ConfigError, match="chunk_size must be at least 1, but is 0"):
        linear_cross_entropy(ones, ones, target, reduction="sum", chunk_size=0)
    with pytest.raises(ConfigError, match="'megatron' needs the tensor-parallel group"):
        linear_cross_entropy(ones, ones, target, reduction="sum", backend="megatron")


def test_no_correctness_where_not_asked_for() -> None:
    hidden, weight, _, target = make(7, 16, 33, torch.float32, False)
    assert hidden is not None and weight is not None and target is not None
    backends: tuple[Backend, ...] = ("logits", "chunked", "torch")
    for backend in backends:
        _, tokens = linear_cross_entropy(
            hidden, weight, target, reduction="sum", backend=backend, with_correct=False
        )
        assert tokens.correct is None


@pytest.mark.parametrize(
    ("backend", "package"),
    [("cce", "cut_cross_entropy"), ("te", "transformer_engine.pytorch.cross_entropy")],
)
def test_names_the_package_that_is_missing(
    backend: Backend, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    ones, target = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(UnsupportedVersionError, match=f"backend '{backend}' needs the package"):
        linear_cross_entropy(ones, ones, target, reduction="sum", backend=backend)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """{package: version} that importlib.metadata shall report; others are not installed."""
    known: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in known:
            raise metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(metadata, "version", version)
    return known


def test_cut_cross_entropy_must_know_a_bias_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("cut_cross_entropy")
    package.__dict__["linear_cross_entropy"] = lambda e, c, targets, **options: None
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", package)
    ones, target = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(
        UnsupportedVersionError, match="'cce' needs a cut-cross-entropy with `bias`"
    ):
        linear_cross_entropy(ones, ones, target, reduction="sum", backend="cce", bias=torch.ones(2))


def test_liger_must_be_new_enough(versions: dict[str, str]) -> None:
    ones, target = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(UnsupportedVersionError, match=r"needs the package liger-kernel >= 0\.8\.2"):
        linear_cross_entropy(ones, ones, target, reduction="sum", backend="liger")
    versions["liger-kernel"] = "0.8.1"
    with pytest.raises(UnsupportedVersionError, match=r"but 0\.8\.1 is installed: its gradients"):
        linear_cross_entropy(ones, ones, target, reduction="sum", backend="liger")


def test_only_the_sum_of_chunks_can_be_differentiated() -> None:
    ones = torch.ones(2, 3, requires_grad=True)
    target = torch.tensor([0, 1])
    head = HeadInputs(hidden=ones, weight=torch.ones(4, 3), target=target)
    total, nll, _ = chunked_cross_entropy(head)
    assert total.requires_grad and not nll.requires_grad
