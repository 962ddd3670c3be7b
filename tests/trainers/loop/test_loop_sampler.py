"""A `MixedStream` in a loop of one's own, on two ranks that read it themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hf_case_tools import HF
from hf_tools import PaddingCollator, tiny_model
from rank_cases import Case, RanksOf, case
from sampler_tools import CONFIG, check_draws, sources, values
from torch.utils.data import DataLoader

from channel_metrics import ChannelMetrics, MixedStream

two = case(HF, ranks=2)
ROWS, WORKERS, AHEAD = 2, 2, 2


def looped(folder: Path, workers: int, lag: int, stop: int = 12) -> Any:
    """Six steps and a checkpoint, then the rest by a new session and a new stream."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, logs = tiny_model(attention_dropout=0.0), []
    for steps in (range(1, 7), range(7, stop + 1)):
        metrics = ChannelMetrics(CONFIG)
        stream = MixedStream(sources(), batch_size=ROWS, lag=lag, rank=rank, ranks=ranks)
        stream.follow(metrics)
        if steps[0] > 1:
            metrics.resume(folder)
        collate = metrics.collator(PaddingCollator())
        loader = DataLoader(stream, batch_size=ROWS, num_workers=workers, collate_fn=collate)
        for step, batch in zip(steps, loader, strict=False):
            with metrics.observe(model, batch):
                model(**batch)
            logs.append(dict(metrics.close(step).logs))
            if step == steps[-1]:
                break
        metrics.save(folder, is_writer=rank == 0)
        dist.barrier()
    return values(logs)


@two
def without_workers(folder: Path) -> Any:
    return looped(folder, 0, 0)


@two
def with_workers(folder: Path) -> Any:
    return looped(folder, WORKERS, ROWS * 2 * WORKERS * AHEAD)


@pytest.mark.parametrize(
    ("of", "lag"), [(without_workers, 0), (with_workers, ROWS * 2 * WORKERS * AHEAD)]
)
def test_two_ranks_with_a_resume(ranks_of: RanksOf, of: Case, lag: int) -> None:
    first, second = ranks_of(of)
    assert first == second and len(first) == 12
    check_draws(first, 2 * ROWS, lag)
