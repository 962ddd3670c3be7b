"""Channel metrics in TRL's KTOTrainer: single answers, desirable or not.

trl 0.29 and 1.5 return the losses and rewards of the answers from `kto_loss`, and ms-swift uses it,
too. Newer TRL has one number per batch. There, the rewards follow from the log probabilities, and
the losses from the rewards and the KL, by TRL's formula. In trl 1.16, both models return the log
probabilities. In trl 1.9 and 1.12, they come from `selective_log_softmax`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor

from channel_metrics.core.schema import Column, Metric, Schema, Sums, ratio, ratio_of
from channel_metrics.data.batch_channels import BatchChannels
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.session import ChannelMetrics
from channel_metrics.swap import wrapped
from channel_metrics.trainers.trl.pairs import PairChannelMetricsMixin
from channel_metrics.trainers.trl.records import BatchRecordsMixin, Call, kept_calls
from channel_metrics.trainers.trl.samples import mean, sample_schema

__all__ = ["KTO_SCHEMA", "KTOChannelMetricsMixin", "KTORecordsMixin"]

_KINDS = ("chosen", "rejected")


def _margin(sums: Sums) -> float | None:
    """As in TRL: the difference of two means."""
    chosen, rejected = (ratio(sums[kind], sums[f"num_{kind}"]) for kind in _KINDS)
    return None if chosen is None or rejected is None else chosen - rejected


KTO_SCHEMA = sample_schema(
    "answers",
    *(Column(kind, "rewards", f"rewards of the {kind} answers") for kind in _KINDS),
    *(Column(f"num_{kind}", "answers", f"{kind} answers") for kind in _KINDS),
    Column("loss", "nats", "losses of the answers, after desirable_weight and undesirable_weight"),
    *(
        Metric(
            f"rewards/{kind}",
            (kind, f"num_{kind}"),
            ratio_of(kind, f"num_{kind}"),
            unit="rewards",
            doc=f"{kind} / num_{kind}",
            always=True,
        )
        for kind in _KINDS
    ),
    Metric(
        "rewards/margins",
        (*_KINDS, *(f"num_{kind}" for kind in _KINDS)),
        _margin,
        unit="rewards",
        doc="rewards/chosen - rewards/rejected",
        always=True,
    ),
    replace(mean("loss", "loss", "nats"), always=False),
)


class KTORecordsMixin(BatchRecordsMixin):
    """For trainers that are built on trl 0.29's KTOTrainer.

    Attributes:
        channel_label_key: the batch key of what is desirable, a list or tensor of bool.
    """

    channel_loss = "kto_loss"
    channel_label_key = "label"

    def _schema(self) -> Schema:
        return KTO_SCHEMA

    def _values(self, calls: Sequence[Call], batch: Any) -> dict[str, Tensor]:
        return _of_kto_loss(calls[0], batch[self.channel_label_key])

    def _batch_loss(self, values: Mapping[str, Tensor], **given: Any) -> Tensor | None:
        return values["loss"].nanmean() if self._loss_is_mean() else None

    def _loss_is_mean(self) -> bool:
        """Whether the loss of a batch is the mean of those of its answers."""
        raise NotImplementedError


class KTOChannelMetricsMixin(PairChannelMetricsMixin):
    """Put before KTOTrainer: `class MyKTO(KTOChannelMetricsMixin, KTOTrainer)`."""

    # What KTOTrainer has.
    aux_loss_enabled: bool
    beta: float
    desirable_weight: float
    undesirable_weight: float
    calculate_KL: bool
    ref_model: Any
    _metrics: dict[str, dict[str, list[float]]]

    def _schema(self) -> Schema:
        return KTO_SCHEMA

    def _observed_step(self, step: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "get_batch_loss_metrics"):
            return super()._observed_step(step, model, inputs, *args, **kwargs)
        # In trl 0.29, an evaluation does not call `compute_loss`.
        return self._observed_loss(step, model, inputs, *args, **kwargs)

    def observe_pairs(
        self, compute: Callable[[], Any], num_pairs: int, model: Any, inputs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The rewards and losses of the answers."""
        reference = self.model if self.ref_model is None else self.ref_model
        with (
            kept_calls(self, "kto_loss") as calls,
            _kept_log_probs(model, reference) as (ours, theirs),
            _kept_softmaxes(self) as softmaxes,
        ):
            result = compute()
        if calls:
            return result, _of_kto_loss(calls[0], inputs["label"])
        if softmaxes:
            # TRL has set to 0 what is not supervised.
            log_probs, forwards = [one.sum(-1) for one in softmaxes], 1 + int(self.calculate_KL)
            ours, theirs = log_probs[:forwards], log_probs[forwards:]
        if "ref_logps" in inputs:
            theirs = [inputs["ref_logps"]]
        # The first forward is for the KL. The reference comes last, also if it is the model
        # without its adapter.
        answers = ours[int(self.calculate_KL) :]
        if not answers or not theirs or len(answers[0]) != num_pairs:
            raise UnsupportedVersionError(
                f"channel metrics need the log probabilities of each answer, but KTOTrainer of trl "
                f"{trl.__version__} gives only sums over a batch here; set use_liger_kernel=False "
                "or use a tested version (see docs/trl.md), or detach the metrics."
            )
        return result, self._computed(inputs["label"].bool(), answers[0], theirs[-1])

    def _computed(self, label: Tensor, log_probs: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """{column: values} by TRL's formula, from the log probabilities of the answers."""
        assert self.model is not None
        kl = self._metrics["train" if self.model.training else "eval"]["kl"][-1]
        with torch.no_grad():
            rewards = self.beta * (log_probs - reference)
            # Without a KL (`apo_zero_unpaired`), it is 0.
            gain = rewards - self.beta * kl
            losses = torch.where(
                label,
                self.desirable_weight * (1 - torch.sigmoid(gain)),
                self.undesirable_weight * (1 - torch.sigmoid(-gain)),
            )
            return _values(label, rewards, losses)

    def _count_pairs(
        self, session: ChannelMetrics, batch: BatchChannels, values: Any, loss: Tensor
    ) -> None:
        if self.aux_loss_enabled:
            # The auxiliary loss of the experts belongs to no answer: nothing to compare.
            loss = values["loss"].mean()
        super()._count_pairs(session, batch, values, loss)


def _of_kto_loss(call: Call, label: Any) -> dict[str, Tensor]:
    """{column: values}, in the order of `label`. `kto_loss` returns the desirable answers first."""
    losses, chosen, rejected = call.results
    label = torch.as_tensor(label, dtype=torch.bool, device=losses.device)
    places = torch.cat([label.nonzero().flatten(), (~label).nonzero().flatten()]).argsort()
    return _values(label, torch.cat([chosen, rejected])[places], losses[places])


def _values(label: Tensor, rewards: Tensor, losses: Tensor) -> dict[str, Tensor]:
    return {
        "chosen": rewards.where(label, 0.0),
        "rejected": rewards.where(~label, 0.0),
        "num_chosen": label.to(losses),
        "num_rejected": (~label).to(losses),
        "loss": losses,
    }


@contextmanager
def _kept_log_probs(*models: Any) -> Iterator[tuple[list[Tensor], ...]]:
    """For each model and each of its forwards, the log probabilities of the answers."""
    kept: tuple[list[Tensor], ...] = tuple([] for _ in models)

    def keep(into: list[Tensor], _model: Any, _args: Any, outputs: Any) -> None:
        log_probs = getattr(outputs, "log_probs", None)
        if log_probs is not None:
            # They are 0 where nothing is supervised, such as at the positions of prompt tuning.
            into.append(log_probs.detach().sum(-1))

    with ExitStack() as stack:
        for model, into in zip(models, kept, strict=True):
            hook = model.register_forward_hook(partial(keep, into))
            stack.callback(hook.remove)
        yield kept


@contextmanager
def _kept_softmaxes(trainer: Any) -> Iterator[list[Tensor]]:
    """What `selective_log_softmax` gives TRL's loss: of the model's forwards, then the reference's.

    Not copied: TRL masks them afterwards, in place.
    """
    kept: list[Tensor] = []

    def keep(original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        kept.append(result.detach())
        return result

    own = next(c for c in type(trainer).__mro__ if c.__name__ == "KTOTrainer")
    module = sys.modules[own.__module__]
    if not hasattr(module, "selective_log_softmax"):
        yield kept
        return
    with wrapped(module, "selective_log_softmax", keep):
        yield kept
