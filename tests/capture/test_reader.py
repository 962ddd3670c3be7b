"""The reader of token losses, with a model and without any trainer."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_tools import PaddingCollator, make_records, tiny_model
from torch import Tensor
from transformers.loss import loss_utils

from channel_metrics import UnsupportedVersionError
from channel_metrics.capture import transformers as capture
from channel_metrics.capture.logits import shifted_labels
from channel_metrics.capture.reader import TokenLossReader
from channel_metrics.losses.cross_entropy import TokenLosses


def batch_of(count: int, seed: int = 0) -> dict[str, Tensor]:
    return PaddingCollator()(make_records(count, seed=seed))


def naive(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[tuple[int, int], float]:
    """{(row, position of the target): nll} of each supervised target."""
    with torch.no_grad():
        logits = model(**batch | {"labels": None}).logits.double().log_softmax(-1)
    return {
        (row, position): -float(logits[row, position - 1, target])
        for row, labels in enumerate(batch["labels"].tolist())
        for position, target in enumerate(labels)
        if target != -100 and position > 0
    }


def read(reader: TokenLossReader, model: torch.nn.Module, batch: dict[str, Any], **how: Any) -> Any:
    with reader.observe(model) as observation:
        output = model(**batch)
    values, reported = reader.read(observation, batch["labels"], **how)
    found = {
        tuple(place): float(values.losses[tuple(place)]) for place in values.mask.nonzero().tolist()
    }
    return output, found, reported


def test_token_losses_stand_at_their_targets() -> None:
    model, batch = tiny_model().eval(), batch_of(5)
    reader = TokenLossReader()
    assert reader.captured is None
    output, found, reported = read(reader, model, batch)
    assert found == pytest.approx(naive(model, batch), rel=1e-5)
    assert reader.captured
    assert float(reported) == pytest.approx(sum(found.values()), rel=1e-5)
    assert output.loss.item() == pytest.approx(sum(found.values()) / len(found), rel=1e-5)


class Unseen(torch.nn.Module):
    """Its loss passes no function that is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model().eval()

    def forward(self, labels: Tensor, factor: float = 1.0, **inputs: Tensor) -> dict[str, Tensor]:
        logits = self.inner(**inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), shifted_labels(labels).flatten())
        return {"loss": factor * loss, "logits": logits}


def test_a_loss_that_is_not_seen_is_measured_on_the_logits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "channel_metrics")
    model, reader = Unseen(), TokenLossReader()
    for seed in range(2):
        batch = batch_of(4, seed)
        _, found, reported = read(reader, model, batch)
        assert found == pytest.approx(naive(model.inner, batch), rel=1e-5)
        assert reported is None and reader.captured is False
    assert caplog.text.count("second softmax") == 1 and not reader.warned


def test_what_is_known_of_the_model_is_remembered_for_other_kinds_of_batches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Batches with labels that are shifted already come first, and say nothing of the others."""
    model, batch = Unseen(), batch_of(4)
    weighted = batch | {"factor": 3.0}
    with pytest.raises(UnsupportedVersionError, match="shifts its labels cannot be told"):
        read(TokenLossReader(), model, weighted)
    reader = TokenLossReader()
    shifted = batch | {"labels": shifted_labels(batch["labels"])}
    read(reader, model, shifted, causal=True, per_token=True)
    _, found, _ = read(reader, model, weighted)
    assert found == pytest.approx(naive(model.inner, batch), rel=1e-5)
    assert reader.warned and "adds or weights something" in caplog.text


class WithLosses(TokenLossReader):
    """A trainer that computes the losses itself, and weights them."""

    def trainer_losses(self, labels: Tensor, *, per_token: bool) -> TokenLosses:
        target = shifted_labels(labels).flatten()
        nll = torch.arange(target.numel()).float()
        return TokenLosses(nll, None, target, nll.sum())

    def weights(self, nll: Tensor, *, per_token: bool) -> Tensor:
        return 2 * nll


def test_losses_of_a_trainer_come_first() -> None:
    labels = torch.tensor([[-100, 5, 6], [7, -100, 8]])
    reader = WithLosses()
    with reader.observe(tiny_model()) as observation:
        pass
    values, reported = reader.read(observation, labels)
    assert values.losses[values.mask].tolist() == [0.0, 1.0, 4.0]
    assert values.mask.tolist() == [[False, True, True], [False, False, True]]
    assert values.weights is not None
    assert values.weights[values.mask].tolist() == [0.0, 2.0, 8.0]
    assert reported == 15.0 and reader.captured


def test_blocks_can_be_nested() -> None:
    own = loss_utils.fixed_cross_entropy
    model, batch, outer, inner = tiny_model(), batch_of(3), TokenLossReader(), TokenLossReader()
    with outer.observe(model) as seen_outside:
        with inner.observe(model) as seen_inside:
            model(**batch)
        assert loss_utils.fixed_cross_entropy is not own
        assert len(seen_inside.losses) == 1 and not seen_outside.losses
        model(**batch)
    assert len(seen_outside.losses) == 1
    assert loss_utils.fixed_cross_entropy is own


@pytest.mark.parametrize("replaced", [False, True])
def test_observing_a_compiled_model_compiles_nothing_again(
    replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = loss_utils.fixed_cross_entropy
    if replaced:
        monkeypatch.setattr(loss_utils, "fixed_cross_entropy", lambda *a, **k: 10 * own(*a, **k))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, reader, batch = tiny_model().eval(), TokenLossReader(), batch_of(4)
    expected = naive(model, batch)
    model.compile(backend=backend)
    model(**batch)
    alone = len(graphs)
    torch._dynamo.reset()
    graphs.clear()
    for _ in range(3):
        _, found, _ = read(reader, model, batch, causal=True)
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(graphs) == alone > 0
    torch._dynamo.reset()


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its version is read: the losses of 4.46 get labels that are one shorter."""
    monkeypatch.setattr(f"{capture.__name__}.transformers.__version__", "4.46.3")
    message = r"need transformers 4\.51 or later, but 4\.46\.3 is installed"
    with pytest.raises(UnsupportedVersionError, match=message):
        capture.check_loss_hook()
