"""Cases of ms-swift's sequence parallelism, on two ranks: Ulysses and rings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import swift_tools
from hf_case_tools import cases_of
from swift.sequence_parallel import sequence_parallel
from swift.sequence_parallel.sequence_parallel import SequenceParallel
from swift_files import ranks_given
from transformers import AttentionInterface

WORLD_SIZE = 2
ENVIRON: dict[str, str] = {}


def _sequence_parallel(folder: Path, *args: Any, **overrides: Any) -> Any:
    given = ranks_given(folder, *args, sequence_parallel_size=2, **overrides)
    try:
        found = swift_tools.both(given)
        ranks = (sequence_parallel.sp_world_size, sequence_parallel.rp_world_size)
        return found | {"ranks": ranks}
    finally:
        sequence_parallel.world_size = 1


def ulysses(folder: Path) -> Any:
    """Padded rows, weighted tokens, and an evaluation; ms-swift's own attention."""
    given = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    found = {"split_dataset_ratio": 0.1, "loss_scale": "react", **given}
    return _sequence_parallel(folder, "react", **found)


def _itself(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None


# Packs under sequence parallelism need flash attention. With this one a token sees only itself,
# so that everything else runs: how rows are cut, losses gathered, and channels counted.
AttentionInterface.register("itself", _itself)


def ulysses_padding_free(folder: Path) -> Any:
    return _sequence_parallel(folder, attn_impl="itself", padding_free=True)


def ring(folder: Path) -> Any:
    """One key-value head cannot be divided: ms-swift takes rings, of zigzag parts."""
    # Its groups are made once per process.
    SequenceParallel._global_inited = False
    return _sequence_parallel(folder, "react", 1, attn_impl="itself", padding_free=True)


CASES = cases_of(globals())
