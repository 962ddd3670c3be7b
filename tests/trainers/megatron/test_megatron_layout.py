"""Which tokens are whose: bounds decide where they are given, else rows, and nothing is divided."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from channel_metrics import (
    BoundaryError,
    ChannelMetrics,
    ChannelMetricsError,
    ConfigError,
    MetricsConfig,
)
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.megatron.step import counting_forward_step

NAMES = ("a", "b", "c", "d")
CONFIG = MetricsConfig(metrics=("loss", "tokens", "samples"))
PACK = [0, 4, 8, 12, 40]


def new_metrics() -> MegatronChannelMetrics:
    return MegatronChannelMetrics(NAMES, config=CONFIG)


def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total, count = (losses * mask).sum(), mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def losses_of(bounds: list[int], rows: int = 1) -> torch.Tensor:
    """The loss is 1 in the first sequence, 2 in the second, ..."""
    lengths = torch.tensor(bounds).diff()
    losses = torch.arange(1.0, len(lengths) + 1).repeat_interleave(lengths)
    return losses.reshape(rows, -1)


def through_a_forward_step(losses: torch.Tensor, **batch: Any) -> dict[str, float]:
    """As Megatron's scripts do it; the rows of the batch are those of `rows`, else of the losses.

    The losses may be flattened, as Megatron flattens rows of documents.
    """
    rows = batch.pop("rows", losses.shape)
    batch = {"labels": torch.zeros(rows).long(), "loss_mask": torch.ones(rows), **batch}

    def forward_step(data_iterator: Any, model: Any) -> Any:
        mask = next(data_iterator)["loss_mask"].reshape(losses.shape)
        return losses, partial(loss_func, mask)

    metrics = new_metrics()
    step = counting_forward_step(forward_step, metrics)
    output, loss = step(iter([batch]), torch.nn.Module())
    loss(output)
    return metrics.compute()


def values(**of_channels: tuple[float, int, int]) -> dict[str, float]:
    """{channel: (loss, tokens, samples)} under their keys."""
    return {
        f"{name}_{metric}": value
        for name, found in of_channels.items()
        for metric, value in zip(("loss", "tokens", "samples"), found, strict=True)
    }


OF_THE_PACK = values(a=(1, 4, 1), b=(2, 4, 1), c=(3, 4, 1), d=(4, 28, 1))


@pytest.mark.parametrize("filling", [[], [40, 40, 40], [-1, -1]])
@pytest.mark.parametrize("channels", [list(NAMES), torch.arange(4)])
def test_the_bounds_of_a_pack_decide(channels: Any, filling: list[int]) -> None:
    """Four sequences in a row of 40 tokens: not ten tokens each."""
    bounds = torch.tensor([[*PACK, *filling]], dtype=torch.int32)
    found = through_a_forward_step(losses_of(PACK), channels=channels, cu_seqlens=bounds)
    assert found == OF_THE_PACK


@pytest.mark.parametrize("key", ["cu_seqlens", "cu_seqlens_q", "cu_seq_lens_q"])
@pytest.mark.parametrize("where", ["batch", "packed_seq_params"])
def test_bounds_have_several_names(key: str, where: str) -> None:
    given: Any = {key: torch.tensor(PACK, dtype=torch.int32)}
    if where == "packed_seq_params":
        given = {where: SimpleNamespace(**given)}
    assert through_a_forward_step(losses_of(PACK), channels=list(NAMES), **given) == OF_THE_PACK


@pytest.mark.parametrize("key", ["cu_seqlens_padded", "cu_seqlens_q_padded"])
def test_the_bounds_of_where_tokens_sit_go_before_those_of_attention(key: str) -> None:
    given = {key: torch.tensor(PACK, dtype=torch.int32)}
    for shorter in ("cu_seqlens", "cu_seqlens_q"):
        given[shorter] = torch.tensor([0, 3, 6, 9, 36], dtype=torch.int32)
    assert through_a_forward_step(losses_of(PACK), channels=list(NAMES), **given) == OF_THE_PACK


def test_the_bounds_of_a_flat_batch_decide() -> None:
    """Labels of one axis, as packs without rows have them."""
    bounds = torch.tensor(PACK, dtype=torch.int32)
    flat = losses_of(PACK)[0]
    found = through_a_forward_step(flat, channels=list(NAMES), cu_seqlens=bounds)
    assert found == OF_THE_PACK
    with pytest.raises(BoundaryError, match="no cu_seqlens"):
        through_a_forward_step(flat, channels=list(NAMES))


def test_tokens_behind_the_last_bound_are_unlabeled() -> None:
    bounds = torch.tensor([0, 4, 8, 12, 36], dtype=torch.int32)
    found = through_a_forward_step(losses_of(PACK), channels=list(NAMES), cu_seqlens=bounds)
    assert found == OF_THE_PACK | values(d=(4, 24, 1), unlabeled=(4, 4, 0))


def test_bounds_of_several_rows() -> None:
    """Two rows of eight tokens; the second holds one sequence."""
    bounds = torch.tensor([[0, 3, 8, 8], [0, 8, 8, 8]], dtype=torch.int32)
    losses = losses_of([0, 3, 8, 16], rows=2)
    found = through_a_forward_step(losses, channels=["a", "b", "c"], cu_seqlens=bounds)
    assert found == values(a=(1, 3, 1), b=(2, 5, 1), c=(3, 8, 1))


def test_one_channel_per_row_where_the_bounds_are_those_of_documents() -> None:
    """A row comes from one data set; Megatron flattens the rows for its attention."""
    bounds = torch.tensor([[0, 3, 8, 8], [0, 5, 8, 8]], dtype=torch.int32)
    found = through_a_forward_step(
        losses_of([0, 8, 16]),
        rows=(2, 8),
        dataset_id=torch.tensor([1, 0]),
        cu_seqlens=bounds,
    )
    assert found == values(b=(1, 8, 1), a=(2, 8, 1))


@pytest.mark.parametrize("channels", [["a", "b"], ["a", "b", "c"]])
def test_what_fits_neither_rows_nor_sequences_is_refused(channels: list[str]) -> None:
    bounds = torch.tensor([PACK], dtype=torch.int32)
    with pytest.raises(BoundaryError, match="4 sequences"):
        through_a_forward_step(losses_of(PACK), channels=channels, cu_seqlens=bounds)
    with pytest.raises(BoundaryError, match="no cu_seqlens"):
        through_a_forward_step(losses_of(PACK), channels=channels)


def counted(losses: torch.Tensor, mask: torch.Tensor, channels: Any, **more: Any) -> Any:
    """In a loop of one's own."""
    metrics = new_metrics()
    loss = partial(loss_func, mask.reshape(losses.shape))
    metrics.count(loss, channels=channels, loss_mask=mask, **more)(losses)
    return metrics.compute()


def test_accuracy_belongs_to_the_losses_that_the_model_returned() -> None:
    """They are matched by the tensor itself: another one of the same shape is refused."""
    metrics = MegatronChannelMetrics(NAMES, config=MetricsConfig(metrics=("token_acc",)))
    mask, correct = torch.ones(1, 4), torch.tensor([[True, False, True, True]])
    returned = torch.zeros(1, 4)
    metrics._correctness.remember(returned, correct)
    counted = metrics.count(partial(loss_func, mask), channels=["a"], loss_mask=mask)
    with pytest.raises(ChannelMetricsError, match="loss function got another tensor"):
        counted(torch.zeros(1, 4))
    counted(returned)
    assert metrics.compute() == {"a_token_acc": 0.75}


def test_the_mask_says_what_the_rows_are() -> None:
    flat, rows = losses_of([0, 8, 16]), torch.ones(2, 8)
    wanted = values(a=(1, 8, 1), c=(2, 8, 1))
    assert counted(flat, rows, ["a", "c"]) == wanted
    with pytest.raises(BoundaryError, match=r"got 2 channels; for a pack .* pass cu_seqlens"):
        counted(flat, rows.reshape(1, 16), torch.tensor([0, 2]))
    bounds = torch.tensor([0, 8, 16], dtype=torch.int32)
    assert counted(flat, rows.reshape(1, 16), ["a", "c"], cu_seqlens=bounds) == wanted


def test_evaluations_are_windows_of_the_same_session() -> None:
    metrics = new_metrics()
    mask = torch.ones(1, 4)
    count = metrics.count(partial(loss_func, mask), channels=["a"], loss_mask=mask)
    count(torch.full((1, 4), 2.0))
    with metrics.session.evaluation("eval", step=1) as evaluation:
        count(torch.full((1, 4), 5.0))
    assert evaluation.logs == {"eval_a_loss": 5, "eval_a_tokens": 4, "eval_a_samples": 1}
    assert metrics.compute() == values(a=(2, 4, 1))


def test_a_session_is_not_given_what_it_has() -> None:
    session = ChannelMetrics(CONFIG)
    assert MegatronChannelMetrics(session=session).session is session
    with pytest.raises(ConfigError, match="together with channels or config"):
        MegatronChannelMetrics(NAMES, session=session)


def test_a_step_that_did_not_begin_cannot_be_discarded() -> None:
    with pytest.raises(Exception, match=r"needs begin_step\(\)"):
        new_metrics().end_step(discard=True)


def test_steps_are_those_of_training() -> None:
    """An evaluation in the middle of a step leaves it as it is, whatever it calls."""
    metrics, mask = new_metrics(), torch.ones(1, 4)
    count = metrics.count(partial(loss_func, mask), channels=["a"], loss_mask=mask)
    metrics.begin_step()
    count(torch.full((1, 4), 2.0))
    with metrics.session.evaluation("eval", step=1) as evaluation:
        metrics.begin_step()
        count(torch.full((1, 4), 5.0))
        metrics.end_step(discard=True)
    assert evaluation.logs["eval_a_tokens"] == 4
    count(torch.full((1, 4), 4.0))
    metrics.end_step()
    assert metrics.compute() == values(a=(3, 8, 2))


def a_forward_step(data_iterator: Any, model: Any) -> Any:
    batch = next(data_iterator)
    return batch["losses"], partial(loss_func, batch["loss_mask"])


def a_batch(loss: float) -> dict[str, Any]:
    rows = {"labels": torch.zeros(1, 4).long(), "loss_mask": torch.ones(1, 4)}
    return {**rows, "losses": torch.full((1, 4), loss), "channels": ["a"]}


def test_validation_without_a_window_does_not_get_into_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A loop that validates by the forward step of training, as Megatron-Bridge's."""
    metrics = new_metrics()
    step = counting_forward_step(a_forward_step, metrics)

    def forward(loss: float) -> None:
        output, loss_function = step(iter([a_batch(loss)]), torch.nn.Module())
        loss_function(output)

    forward(1.0)
    with torch.no_grad():
        forward(9.0)
        forward(9.0)
        with metrics.session.evaluation("eval", step=1) as evaluation:
            forward(5.0)
    assert evaluation.logs == {"eval_a_loss": 5, "eval_a_tokens": 4, "eval_a_samples": 1}
    assert metrics.compute() == values(a=(1, 4, 1))
    assert caplog.text.count("computed without gradients are not counted") == 1


def test_data_that_ends_in_the_middle_of_a_step() -> None:
    """The loop sees the end, and what the step has counted can be left out."""
    metrics = new_metrics()
    step = counting_forward_step(a_forward_step, metrics)
    data = iter([a_batch(1.0), a_batch(3.0), a_batch(100.0)])

    def step_of_two() -> None:
        metrics.begin_step()
        for _ in range(2):
            output, loss_function = step(data, torch.nn.Module())
            loss_function(output)
        metrics.end_step()

    step_of_two()
    with pytest.raises(StopIteration):
        step_of_two()
    metrics.end_step(discard=True)
    assert metrics.compute() == values(a=(2, 8, 2))


def test_crossings_are_told_by_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    """Megatron's scripts ignore warnings on all ranks but the first. Once, for the first batch."""
    metrics, mask = new_metrics(), torch.ones(1, 8)
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "channel_metrics"):
        warnings.simplefilter("ignore", UserWarning)
        for number in (3, 5):
            metrics.count(
                partial(loss_func, mask),
                channels=["a", "b"],
                loss_mask=mask,
                cu_seqlens=bounds,
                num_crossings=number,
            )(torch.ones(1, 8))
    (record,) = caplog.records
    assert record.getMessage().startswith("3 supervised targets of this micro-batch")
