"""Context, sequence and tensor parallelism on two ranks: each token is counted by exactly one.

The slicing and the layouts alone are in `test_hf_row_cuts.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig
from datasets import Dataset
from hf_case_tools import (
    FSDP2,
    TP_SIZES,
    channel_values,
    fixed_records,
    fsdp,
    needs_deepspeed,
    run,
    told,
    zero,
    zero_config,
)
from hf_tools import (
    PaddingCollator,
    Record,
    expected_entropies,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
)
from rank_cases import RanksOf
from torch.distributed.nn.functional import all_gather
from transformers import Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from channel_metrics import MetricsConfig

COUNTS = MetricsConfig(metrics=("loss", "tokens", "token_acc", "share", "entropy"))
# Labels of single tokens are cut with the rows; that of a record is a part of its name.
IMAGES = list(range(0, 61, 4))
ROLES = replace(
    COUNTS,
    axes={
        "role": {"by": "column", "field": "roles"},
        "kind": {"by": "modality", "labels": {"image": IMAGES}},
        "lang": "meta.lang",
    },
)


def role_of(token: int) -> str | None:
    return ("user", "assistant", None)[token % 3]


def language_of(ids: Sequence[int]) -> str | None:
    return ("en", "de", None)[sum(ids) % 3]


def with_roles(records: list[Record]) -> list[Record]:
    found = []
    for one in records:
        roles = [role_of(token) for token in one["input_ids"]]
        found.append({**one, "roles": roles, "meta": {"lang": language_of(one["input_ids"])}})
    return found


def check_roles(
    ranks: list[Any],
    model: torch.nn.Module,
    records: list[Record],
    held_out: list[Record],
    seen: list[list[Any]],
) -> None:
    """As `check`, for the further axes; their entropy is one more sum of the same."""
    table = token_table(model, records)
    of_language = {
        ids: (f"lang/{language_of(ids) or 'unlabeled'}", tokens)
        for ids, (_, tokens) in table.items()
    }
    targets = {tuple(r["input_ids"]): [t for t in r["labels"][1:] if t != -100] for r in records}
    by_label: dict[str, Callable[[int], str]] = {
        "role": lambda token: role_of(token) or "unlabeled",
        "kind": lambda token: "image" if token in IMAGES else "text",
    }

    def expected(batches: list[Any], prefix: str) -> dict[str, float]:
        found = expected_metrics(of_language, batches, prefix=prefix)
        for axis, label_of in by_label.items():
            # Each token alone is a record of the oracle, with its label as the channel.
            alone = {}
            for ids in (tuple(ids) for batch in batches for ids in batch):
                for at, (token, one) in enumerate(zip(targets[ids], table[ids][1], strict=True)):
                    alone[(*ids, at)] = (f"{axis}/{label_of(token)}", [one])
            found |= expected_metrics(alone, [list(alone)], prefix=prefix)
        return found

    def labels_of(entry: dict[str, float], prefix: str = "") -> dict[str, float]:
        return {
            key: value
            for key, value in entry.items()
            if key.startswith(tuple(f"{prefix}{axis}/" for axis in ROLES.axes))
            and "entropy" not in key
        }

    of_held_out = expected([[r["input_ids"] for r in held_out]], "eval_")
    for rank in ranks:
        logs = [entry for entry in rank["logs"] if "loss" in entry]
        for entry, batches in zip(logs, seen, strict=True):
            assert labels_of(entry) == pytest.approx(expected(batches, ""), rel=1e-5)
        assert labels_of(rank["evaluated"], "eval_") == pytest.approx(of_held_out, rel=1e-5)


def check(
    ranks: list[Any],
    model: torch.nn.Module,
    records: list[Record],
    held_out: list[Record],
    seen: list[list[Any]],
) -> None:
    """Every train window is the oracle on `seen`, and the evaluation that on `held_out`."""
    table = token_table(model, [*records, *held_out])

    def expected(batches: Any, prefix: str = "") -> dict[str, float]:
        entropies = expected_entropies(model, [*records, *held_out], batches, prefix)
        return expected_metrics(table, batches, prefix) | entropies

    expected_eval = expected([[r["input_ids"] for r in held_out]], "eval_")
    for rank in ranks:
        assert not rank["warned"]
        logs = [entry for entry in rank["logs"] if "loss" in entry]
        assert len(logs) == len(seen)
        for entry, batches in zip(logs, seen, strict=True):
            assert channel_values(entry) == pytest.approx(expected(batches), rel=1e-5)
        assert channel_values(rank["evaluated"], "eval_") == pytest.approx(expected_eval, rel=1e-5)


class Unpadded(PaddingCollator):
    """Rows of one width; context parallelism takes no mask."""

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        del batch["attention_mask"]
        return batch


def _attention_over_ranks(
    module: Any, query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any
) -> Any:
    """Causal attention over the rows of all ranks: torch's ring attention has no CPU kernel."""
    ranks = dist.get_world_size()
    # How torch balances the load: of four parts, rank 0 holds the first and the last.
    parts = torch.arange(query.shape[2] * ranks).chunk(2 * ranks)
    held = [torch.cat([parts[r], parts[-1 - r]]) for r in range(ranks)]
    key, value = (torch.cat(all_gather(part.contiguous()), dim=2) for part in (key, value))
    mask = held[dist.get_rank()][:, None] >= torch.cat(held)
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = (query @ key.transpose(2, 3)) * module.scaling
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@fsdp
def context_parallel(folder: Path) -> Any:
    """Both ranks train on halves of the same rows."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention_over_ranks
    trainer = run(
        folder,
        config=ROLES,
        records=with_roles(fixed_records(32)),
        collator=Unpadded(),
        model=tiny_model(attention_dropout=0.0, attn_implementation="sdpa"),
        parallelism_config=ParallelismConfig(cp_size=2),
        max_steps=4,
        **FSDP2,
    )
    held_out = Dataset.from_list(with_roles(fixed_records(10, seed=1)))
    evaluated = trainer.evaluate(held_out)
    del ALL_ATTENTION_FUNCTIONS["sdpa"]
    return told(trainer, evaluated=evaluated)


def test_context_parallel_ranks_count_their_parts(ranks_of: RanksOf) -> None:
    ranks = ranks_of(context_parallel)
    assert {rank["kind"] for rank in ranks} == {"FSDP"}
    # Both ranks read the same rows, and share them.
    assert ranks[0]["batches"] == ranks[1]["batches"]
    held_out = fixed_records(10, seed=1)
    batches, model = ranks[0]["batches"], tiny_model(attention_dropout=0.0)
    seen = [batches[:2], batches[2:4]]
    check(ranks, model, fixed_records(32), held_out, seen)
    check_roles(ranks, model, [*fixed_records(32), *held_out], held_out, seen)


@fsdp
def tensor_parallel(folder: Path) -> Any:
    """Both ranks train on the same rows, with a part of each weight."""
    # What transformers has left for accelerate in the cases before.
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    saved = folder / "model"
    tiny_model(**TP_SIZES).save_pretrained(saved)  # by the first rank only
    dist.barrier()
    model = Qwen2ForCausalLM.from_pretrained(saved, tp_plan="auto", dtype=torch.float32)
    trainer = run(folder, config=COUNTS, records=make_records(64), model=model)
    held_out = Dataset.from_list(make_records(10, seed=1))
    return told(trainer, evaluated=trainer.evaluate(held_out))


def test_tensor_parallel_ranks_count_once(ranks_of: RanksOf) -> None:
    ranks = ranks_of(tensor_parallel)
    assert ranks[0]["batches"] == ranks[1]["batches"]
    held_out = make_records(10, seed=1)
    # transformers' saved weights are those of the model that the oracle gets.
    batches, model = ranks[0]["batches"], tiny_model(**TP_SIZES)
    check(ranks, model, make_records(64), held_out, [batches[:2], batches[2:4]])


class Positioned(PaddingCollator):
    """Ulysses wants positions, and takes no mask."""

    def __call__(self, features: list[Any]) -> dict[str, torch.Tensor]:
        batch = super().__call__(features)
        rows, width = batch["input_ids"].shape
        del batch["attention_mask"]
        return {**batch, "position_ids": torch.arange(width).repeat(rows, 1)}


@zero
def ulysses(folder: Path) -> Any:
    """Both ranks train on halves of the rows, first of the one's batch, then of the other's."""
    sequence = DeepSpeedSequenceParallelConfig(
        sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
    )
    trainer = run(
        folder,
        config=ROLES,
        records=with_roles(fixed_records(32)),
        collator=Positioned(),
        model=tiny_model(attention_dropout=0.0, num_key_value_heads=2, attn_implementation="sdpa"),
        use_cpu=False,
        ddp_backend=None,
        deepspeed=zero_config(1),
        parallelism_config=ParallelismConfig(sp_size=2, sp_handler=sequence),
        # DeepSpeed cuts rows as views, and on a CPU nothing makes them contiguous: one row has no
        # such problem.
        per_device_train_batch_size=1,
        max_steps=4,
    )
    held_out = Dataset.from_list(with_roles(fixed_records(10, seed=1)))
    return told(trainer, evaluated=trainer.evaluate(held_out))


@needs_deepspeed
def test_ulysses_ranks_count_their_parts(ranks_of: RanksOf) -> None:
    ranks = ranks_of(ulysses)
    assert {rank["kind"] for rank in ranks} == {"DEEPSPEED"}
    held_out = fixed_records(10, seed=1)
    model = tiny_model(attention_dropout=0.0, num_key_value_heads=2)
    # A step is a batch of one of the ranks, which both work on; two steps are a window.
    first, second = (rank["batches"] for rank in ranks)
    seen = [[first[0], second[0]], [first[1], second[1]]]
    check(ranks, model, fixed_records(32), held_out, seen)
    check_roles(ranks, model, [*fixed_records(32), *held_out], held_out, seen)
