"""Token losses of a cross entropy: the loss itself unchanged bit for bit, the tokens right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from channel_metrics.losses.cross_entropy import cross_entropy, token_losses_of_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(
    num_tokens: int, vocabulary: int, dtype: torch.dtype, ignored: str, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = 4 * torch.randn(num_tokens, vocabulary, generator=generator, dtype=torch.float64)
    target = torch.randint(vocabulary, (num_tokens,), generator=generator)
    if ignored != "none":
        target[:: 3 if ignored == "some" else 1] = ignore_index
    return logits.to(dtype), target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("size", [(1, 2), (7, 11), (65, 1031)])
def test_loss_and_gradient_are_those_of_torch(
    dtype: torch.dtype, reduction: str, ignored: str, size: tuple[int, int]
) -> None:
    logits, target = make(*size, dtype, ignored)
    theirs, ours = (logits.clone().requires_grad_() for _ in range(2))
    expected = F.cross_entropy(theirs, target, reduction=reduction)
    loss, tokens = cross_entropy(ours, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, equal_nan=True)
    assert not tokens.nll.requires_grad
    assert not tokens.reported_sum.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_nll_against_float64(dtype: torch.dtype) -> None:
    logits, target = make(65, 1031, dtype, "some")
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    _, tokens = cross_entropy(logits, target, reduction="sum")
    # log_softmax rounds its result once: half a unit in the last place, and a little.
    torch.testing.assert_close(
        tokens.nll.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
    second = token_losses_of_logits(logits, target, chunk_size=16)
    torch.testing.assert_close(second.nll.double(), exact, rtol=1e-6, atol=1e-6)
    assert (tokens.nll[target == -100] == 0).all()
    assert (second.nll[target == -100] == 0).all()
    assert second.reported_sum.item() == pytest.approx(exact.sum().item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reported_sum_is_what_the_loss_was_reduced_from(reduction: str) -> None:
    logits, target = make(65, 11, torch.float32, "some")
    loss, tokens = cross_entropy(logits, target, reduction=reduction)
    count = (target != -100).sum() if reduction == "mean" else 1
    assert tokens.reported_sum.item() == pytest.approx(loss.item() * float(count), rel=1e-6)
    assert tokens.reported_sum.item() == pytest.approx(tokens.nll.double().sum().item(), rel=1e-6)


def test_other_ignore_index() -> None:
    logits, target = make(9, 5, torch.float32, "some", ignore_index=0)
    loss, tokens = cross_entropy(logits, target, reduction="mean", ignore_index=0)
    assert loss == F.cross_entropy(logits, target, ignore_index=0)
    assert (tokens.nll[target == 0] == 0).all()
    assert tokens.reported_sum.item() == pytest.approx(tokens.nll.sum().item(), rel=1e-6)
    second = token_losses_of_logits(logits, target, ignore_index=0)
    torch.testing.assert_close(second.nll, tokens.nll)


LOGITS = torch.tensor(
    [
        [3.0, 1.0, 2.0],  # right
        [3.0, 1.0, 2.0],  # wrong
        [2.0, 2.0, 0.0],  # a tie counts
        [2.0, 2.0, 2.5],  # a tie below the maximum does not
        [float("nan"), 1.0, 2.0],  # nothing is predicted
    ]
)
TARGET = torch.tensor([0, 1, 1, 0, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_correct(dtype: torch.dtype) -> None:
    _, tokens = cross_entropy(LOGITS.to(dtype), TARGET, reduction="sum")
    second = token_losses_of_logits(LOGITS.to(dtype), TARGET, chunk_size=2)
    for found in (tokens, second):
        assert found.correct is not None
        assert found.correct.tolist() == [True, False, True, False, False]
        assert found.target is TARGET
    logits, target = make(65, 1031, dtype, "none")
    _, many = cross_entropy(logits, target, reduction="sum")
    ties = (logits == logits.amax(-1, keepdim=True)).gather(1, target[:, None])[:, 0]
    assert many.correct is not None
    assert torch.equal(many.correct, ties)


def test_correct_can_be_left_out() -> None:
    assert cross_entropy(LOGITS, TARGET, reduction="sum", with_correct=False)[1].correct is None
    assert token_losses_of_logits(LOGITS, TARGET, with_correct=False).correct is None


def test_no_tokens() -> None:
    logits, target = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
    loss, tokens = cross_entropy(logits, target, reduction="sum")
    assert (loss.item(), tokens.nll.shape, tokens.reported_sum.item()) == (0, (0,), 0)
    assert token_losses_of_logits(logits, target).nll.shape == (0,)
