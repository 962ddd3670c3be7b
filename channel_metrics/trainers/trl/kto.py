"""Channel metrics of KTO: single answers, desirable (chosen) or not (rejected)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.schema import Column, Metric, Schema, Sums, ratio
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch
from channel_metrics.trainers.trl.records import RecordsMixin, not_called
from channel_metrics.trainers.trl.samples import mean, sample_schema

__all__ = ["KTORecordsMixin"]

_KINDS = ("chosen", "rejected")


def _mean_of(kind: str, sums: Sums) -> float | None:
    return ratio(sums[kind], sums[f"num_{kind}"])


def _margin(sums: Sums) -> float | None:
    """As in TRL: the difference of two means."""
    chosen, rejected = (_mean_of(kind, sums) for kind in _KINDS)
    return None if chosen is None or rejected is None else chosen - rejected


_SCHEMA = sample_schema(
    "answers",
    *(Column(kind, "rewards", f"rewards of the {kind} answers") for kind in _KINDS),
    *(Column(f"num_{kind}", "answers", f"{kind} answers") for kind in _KINDS),
    Column("loss", "loss", "losses of the answers, after desirable_weight and undesirable_weight"),
    *(
        Metric(
            f"rewards/{kind}",
            (kind, f"num_{kind}"),
            partial(_mean_of, kind),
            doc=f"{kind} / num_{kind}",
            always=True,
        )
        for kind in _KINDS
    ),
    Metric(
        "rewards/margins",
        (*_KINDS, *(f"num_{kind}" for kind in _KINDS)),
        _margin,
        doc="rewards/chosen - rewards/rejected",
        always=True,
    ),
    replace(mean("loss", "loss"), always=False),
)


@dataclass
class _KTOScratch(Scratch):
    """kept: the losses, and the rewards of the chosen and of the rejected answers, as TRL returns
    them: the chosen come first."""

    kept: tuple[Tensor, ...] = ()


class KTORecordsMixin(RecordsMixin):
    """For trainers with `kto_loss`, which TRL's KTOTrainer has.

    Attributes:
        channel_label_key: the batch key of what is desirable, a list or tensor of bool.
    """

    channel_scratch: _KTOScratch
    channel_label_key = "label"

    def _schema(self) -> Schema:
        return _SCHEMA

    def _new_scratch(self, session: ChannelMetrics) -> _KTOScratch:
        return _KTOScratch(super()._new_scratch(session).reader)

    def kto_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().kto_loss(*args, **kwargs)  # type: ignore[misc]
        self.channel_scratch.kept = tuple(part.detach() for part in result[:3])
        return result

    def _observed_batch(
        self, compute: Any, model: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        session, scratch = self.channel_metrics, self.channel_scratch
        assert session is not None
        taken = self._taken_channels(batch)
        result = compute(model, batch, *args, **kwargs)
        if not scratch.kept:
            raise not_called(self, "kto_loss")
        (losses, chosen, rejected), scratch.kept = scratch.kept, ()
        # From TRL's order to that of the batch, in which the repeated records are the last.
        label = torch.as_tensor(batch[self.channel_label_key]).cpu()
        order = torch.cat([label.nonzero().flatten(), (~label).nonzero().flatten()])
        places = order.argsort().to(losses.device)
        with torch.no_grad():
            values = self._values(losses, chosen, rejected)
            values = {name: value[places] for name, value in values.items()}
        self._count_records(
            session,
            taken.channels,
            values,
            ours=losses.nanmean() if self._loss_is_mean() else None,
            theirs=result[0].detach(),
        )
        return result

    def _loss_is_mean(self) -> bool:
        """Whether the loss of a batch is the mean of those of its answers."""
        raise NotImplementedError

    def _values(self, losses: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """{column: values}, the chosen answers first."""
        ones = torch.ones_like(losses)
        is_chosen = torch.arange(losses.shape[0], device=losses.device) < chosen.shape[0]
        return {
            "samples": ones,
            "chosen": torch.cat([chosen, torch.zeros_like(rejected)]),
            "rejected": torch.cat([torch.zeros_like(chosen), rejected]),
            "num_chosen": ones * is_chosen,
            "num_rejected": ones * ~is_chosen,
            "loss": losses,
        }
