"""Ways to add up a packed batch per channel: what `update` could be made of.

Each gives [nll, tokens] per channel from the same losses, mask, bounds and ids. They say how near
plain PyTorch can come to one masked sum; docs/benchmarks.md says which is used, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import compare, one_thread
from benchmarks.update import CASES, Case, Tokens, make_tokens, masked_sum

__all__ = ["run"]

Call = Callable[[], Tensor]


def run(num_rounds: int = 100) -> list[dict[str, object]]:
    """All of them, in both cases; their sums are compared first."""
    rows: list[dict[str, object]] = []
    for case in CASES:
        tokens = make_tokens(case)
        calls = _calls(tokens, case)
        expected = calls["segment_reduce, float64"]()
        for name, call in calls.items():
            torch.testing.assert_close(call().double(), expected, rtol=1e-5, atol=0, msg=name)
        with one_thread():
            timings = compare(
                {"masked sum": partial(masked_sum, tokens), **calls},
                num_rounds=num_rounds,
                num_calls=3,
                num_warmup=5,
            )
        rows += [asdict(case) | asdict(timing) for timing in timings]
    return rows


def _calls(tokens: Tokens, case: Case) -> dict[str, Call]:
    losses, ids, bounds, size = tokens.losses, tokens.ids, tokens.bounds, case.num_channels
    mask = tokens.mask.view(torch.uint8)
    # What a collator could have made beforehand.
    lengths = bounds.diff().long()
    counts = torch.segment_reduce(mask.double(), "sum", lengths=lengths)
    of_token = ids.repeat_interleave(lengths)
    by_channel = of_token.argsort(stable=True)
    channel_lengths = of_token.bincount(minlength=size)

    def segments(dtype: torch.dtype) -> Tensor:
        columns = torch.cat([(losses * mask).to(dtype), mask.to(dtype)])
        sums = torch.segment_reduce(
            columns, "sum", lengths=torch.cat([bounds.diff().long()] * 2), unsafe=True
        )
        return _grouped(sums.view(2, -1), ids, size)

    def segments_of_losses() -> Tensor:
        column = (losses * mask).double()
        sums = torch.segment_reduce(
            column, "sum", lengths=bounds.diff().long(), unsafe=True, initial=0
        )
        return _grouped(torch.stack([sums, counts]), ids, size)

    def prefix(in_pairs: bool) -> Tensor:
        sums = [_prefix_sums(losses * mask, bounds, in_pairs), _prefix_sums(mask, bounds, in_pairs)]
        return _grouped(torch.stack(sums), ids, size)

    def prefix_of_losses() -> Tensor:
        sums = torch.stack([_prefix_sums(losses * mask, bounds, True), counts])
        return _grouped(sums, ids, size)

    def running_counts() -> Tensor:
        column = (losses * mask).double()
        sums = torch.segment_reduce(
            column, "sum", lengths=bounds.diff().long(), unsafe=True, initial=0
        )
        running = F.pad(mask, (1, 0)).cumsum(0)
        return _grouped(torch.stack([sums, running.index_select(0, bounds).diff()]), ids, size)

    def tokens_by_id() -> Tensor:
        return _grouped(torch.stack([(losses * mask).double(), mask.double()]), of_token, size)

    def sorted_by_channel() -> Tensor:
        columns = [(losses * mask)[by_channel].double(), mask[by_channel].double()]
        sums = [
            torch.segment_reduce(c, "sum", lengths=channel_lengths, unsafe=True) for c in columns
        ]
        return torch.stack(sums)

    def one_hot_product() -> Tensor:
        one_hot = F.one_hot(of_token, size).to(losses.dtype)
        return torch.stack([losses * mask, mask.to(losses.dtype)]) @ one_hot

    return {
        "segment_reduce, float32": partial(segments, torch.float32),
        "segment_reduce, float64": partial(segments, torch.float64),
        "segment_reduce, float64, tokens known": segments_of_losses,
        "segment_reduce, float64, running counts": running_counts,
        "prefix sums": partial(prefix, False),
        "prefix sums in pairs": partial(prefix, True),
        "prefix sums in pairs, tokens known": prefix_of_losses,
        "index_add of tokens, ids per token known": tokens_by_id,
        "tokens sorted by channel, order known": sorted_by_channel,
        "product with a one-hot, ids per token known": one_hot_product,
    }


def _grouped(sums: Tensor, ids: Tensor, num_channels: int) -> Tensor:
    return sums.new_zeros(len(sums), num_channels).index_add_(1, ids, sums)


def _prefix_sums(column: Tensor, bounds: Tensor, in_pairs: bool) -> Tensor:
    """[N], as differences of float64 prefix sums.

    in_pairs: as complex numbers, so that two sums run beside each other: c[t] = x[t] + c[t - 2],
    and the sum of all tokens before t is c[t - 1] + c[t - 2].
    """
    num_tokens = column.numel()
    # Two zeros in front, and an even length.
    padded = column.new_empty(num_tokens + 2 + num_tokens % 2, dtype=torch.float64)
    padded[:2] = 0
    padded[2 : num_tokens + 2] = column
    padded[num_tokens + 2 :] = 0
    if in_pairs:
        pairs = torch.view_as_complex(padded.view(-1, 2)).cumsum(0)
        running = torch.view_as_real(pairs).view(-1)
        before = running.index_select(0, bounds + 1) + running.index_select(0, bounds)
    else:
        before = padded.cumsum(0).index_select(0, bounds + 1)
    return before.diff()
