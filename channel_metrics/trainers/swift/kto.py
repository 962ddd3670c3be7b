"""Channel metrics in `swift rlhf --rlhf_type kto`: single answers, desirable or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from channel_metrics.core.schema import Column, Metric, Schema, Sums, ratio
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch
from channel_metrics.trainers.swift.rlhf import SwiftRLHFMixin, not_called
from channel_metrics.trainers.trl.samples import mean, sample_schema

__all__ = ["SwiftKTOMixin"]

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
    Column("loss", "nats", "losses of the answers, after desirable_weight and undesirable_weight"),
    *(
        Metric(
            f"rewards/{kind}",
            (kind, f"num_{kind}"),
            partial(_mean_of, kind),
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


@dataclass
class _KTOScratch(Scratch):
    """kept: the losses, and the rewards of the chosen and of the rejected answers, as TRL returns
    them: the chosen come first."""

    kept: tuple[Tensor, ...] = ()


class SwiftKTOMixin(SwiftRLHFMixin):
    """For `swift rlhf --rlhf_type kto`."""

    channel_scratch: _KTOScratch
    aux_loss_enabled: bool

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
        label = torch.tensor(batch["label"])
        order = torch.cat([label.nonzero().flatten(), (~label).nonzero().flatten()])
        places = order.argsort().to(losses.device)
        with torch.no_grad():
            values = self._values(losses, chosen, rejected)
            values = {name: value[places] for name, value in values.items()}
        self._count_records(
            session,
            taken.channels,
            values,
            # The auxiliary loss of experts belongs to no answer.
            ours=None if self.aux_loss_enabled else losses.nanmean(),
            theirs=result[0].detach(),
        )
        return result

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
