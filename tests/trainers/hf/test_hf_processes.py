"""Many real processes: the numbers are those of one process on the same data; nobody hangs.

The runs themselves are the cases in `hf_cases_*.py`.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from hf_case_tools import fixed_records, weights_hash
from hf_launch import Launch, launch
from hf_tools import expected_metrics, make_records, tiny_model, token_table

RECORDS = make_records(64)
KEYS = ("loss", "grad_norm", "learning_rate", "eval_loss", "train_loss", "step")

deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is only in the main environment (Python 3.11), which runs this",
)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("ddp", tmp_path_factory)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("sharded", tmp_path_factory)


@pytest.fixture(scope="module")
def table() -> dict[tuple[int, ...], Any]:
    held_out = [make_records(size, seed=size) for size in (3, 10, 17)]
    records = [*RECORDS, *make_records(10, seed=1), *(r for part in held_out for r in part)]
    return token_table(tiny_model(attention_dropout=0.0), records)


def channel_values(entry: dict[str, float], prefix: str = "") -> dict[str, float]:
    names = tuple(f"{prefix}{name}_" for name in ("bbu", "rru", "lvis", "lang_chat", "unlabeled"))
    return {key: value for key, value in entry.items() if key.startswith(names)}


def check_windows(ranks: list[Any], table: Any, *, steps: int, accumulation: int) -> None:
    """Windows of `steps` steps equal the oracle on what the ranks saw together."""
    for rank in ranks:
        assert rank["processes"] == len(ranks)
        assert not rank["warned"]
        logs = [entry for entry in rank["logs"] if "loss" in entry]
        assert len(logs) >= 2
        for index, entry in enumerate(logs):
            start, end = (edge * steps * accumulation for edge in (index, index + 1))
            seen = [batch for other in ranks for batch in other["batches"][start:end]]
            assert channel_values(entry) == pytest.approx(expected_metrics(table, seen), rel=1e-5)


def step_losses(ranks: list[Any], table: Any, step: int, accumulation: int) -> list[list[float]]:
    """The nll of each token, by rank, of one step."""
    batches = slice(step * accumulation, (step + 1) * accumulation)
    return [
        [
            nll
            for batch in rank["batches"][batches]
            for ids in batch
            for nll, _ in table[tuple(ids)][1]
        ]
        for rank in ranks
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("case", ["average_on", "average_off"])
def test_two_ranks_equal_one_process(ddp: Launch, table: Any, case: str) -> None:
    ranks = ddp.ranks(case)
    check_windows(ranks, table, steps=2, accumulation=2)
    # What the trainer reports: over all tokens of a step, or the mean of the means of the ranks.
    logged = [entry["loss"] for entry in ranks[0]["logs"] if "loss" in entry]
    for window, loss in enumerate(logged):
        by_step = [step_losses(ranks, table, 2 * window + step, 2) for step in (0, 1)]
        if case == "average_on":
            expected = mean([mean([nll for rank in step for nll in rank]) for step in by_step])
        else:
            expected = mean([mean([mean(rank) for rank in step]) for step in by_step])
        assert loss == pytest.approx(expected, rel=1e-5)


def test_four_ranks_equal_one_process(ddp: Launch, table: Any) -> None:
    ranks = ddp.ranks("four_ranks")
    assert len(ranks) == 4
    check_windows(ranks, table, steps=2, accumulation=1)
    for size in (3, 10, 17):
        held_out = [[r["input_ids"] for r in make_records(size, seed=size)]]
        expected = expected_metrics(table, held_out, prefix="eval_")
        for rank in ranks:
            found = channel_values(rank["evaluated"][str(size)], "eval_")
            assert found == pytest.approx(expected, rel=1e-5)


@deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_one_process(sharded: Launch, table: Any, stage: int) -> None:
    ranks = sharded.ranks(f"zero{stage}")
    assert {rank["kind"] for rank in ranks} == {"DEEPSPEED"}
    check_windows(ranks, table, steps=2, accumulation=2)
    check_held_out(ranks, table)


def test_fsdp2_equals_one_process(sharded: Launch, table: Any) -> None:
    ranks = sharded.ranks("fsdp2")
    assert {rank["kind"] for rank in ranks} == {"FSDP"}
    assert {rank["model"] for rank in ranks} == {"FSDPQwen2ForCausalLM"}
    check_windows(ranks, table, steps=2, accumulation=1)
    check_held_out(ranks, table)


def check_held_out(ranks: list[Any], table: Any) -> None:
    held_out = [[r["input_ids"] for r in make_records(10, seed=1)]]
    expected = expected_metrics(table, held_out, prefix="eval_")
    for rank in ranks:
        assert channel_values(rank["evaluated"], "eval_") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("launched", "case"),
    [
        ("ddp", "bits"),
        ("sharded", "fsdp2_bits"),
        pytest.param("sharded", "zero2_bits", marks=deepspeed),
    ],
)
def test_training_is_bit_identical(request: Any, launched: str, case: str) -> None:
    launched_cases = request.getfixturevalue(launched)
    off, on = (launched_cases.ranks(f"{case}_{switch}") for switch in ("off", "on"))
    for rank_off, rank_on in zip(off, on, strict=True):
        assert rank_off["weights"] == rank_on["weights"]
        assert rank_off.get("random") == rank_on.get("random")
        kept = [[{k: e[k] for k in KEYS if k in e} for e in r["logs"]] for r in (rank_off, rank_on)]
        assert kept[0] == kept[1]
        assert any("bbu_loss" in entry for entry in rank_on["logs"])
        assert not any("bbu_loss" in entry for entry in rank_off["logs"])
    untrained = tiny_model(attention_dropout=0.1)
    assert on[0]["weights"] != weights_hash(untrained)


def test_ranks_meet_names_on_the_way(ddp: Launch) -> None:
    """A channel of one rank, of no rank in a window, and one that appears late."""
    ranks = ddp.ranks("tables")
    names = [
        {k.removesuffix("_loss") for k in e if k.endswith("_loss")} - {"train"}
        for e in ranks[0]["logs"]
    ]
    assert names[:6] == [
        {"bbu", "rru"},
        {"bbu"},
        {"rru", "bbu"},
        {"bbu", "late"},
        {"bbu", "rru"},
        {"late", "rru"},
    ]
    assert ranks[0]["table"] == ["bbu", "rru", "late"]
    assert ranks[1]["table"] == ["rru", "bbu", "late"]
    for first, second in zip(ranks[0]["logs"][:6], ranks[1]["logs"][:6], strict=True):
        assert first == second


def test_one_all_reduce_per_window(ddp: Launch) -> None:
    """Names that not all ranks have met cost three more, once; the last is that of the end."""
    new = ["all_reduce"] * 4
    steady = ["all_reduce"]
    for rank in ddp.ranks("tables"):
        assert rank["windows"] == [new, steady, steady, new, steady, steady, steady]


def test_a_rank_with_nothing_supervised(ddp: Launch, table: Any) -> None:
    ranks = ddp.ranks("nothing_supervised")
    for rank in ranks:
        first = channel_values(rank["logs"][0])
        seen = ranks[0]["batches"][:2]
        assert first == pytest.approx(expected_metrics(table, seen), rel=1e-5)


def test_a_rank_without_a_batch_takes_part(ddp: Launch) -> None:
    expected = {"bbu_loss": 2.0, "bbu_tokens": 2.0, "bbu_share": 1.0}
    assert ddp.ranks("no_batch") == [[expected] * 2] * 2


def test_training_counts_the_repetitions_it_trains_on(ddp: Launch, table: Any) -> None:
    """Ten records in batches of four on two ranks: two steps, sixteen rows trained."""
    ranks = ddp.ranks("uneven_training")
    seen = [ids for rank in ranks for batch in rank["batches"] for ids in batch]
    assert len(seen) == 16 and len({json.dumps(ids) for ids in seen}) == 10
    tokens = sum(len(table[tuple(ids)][1]) for ids in seen)
    found = sum(v for e in ranks[0]["logs"] for k, v in e.items() if k.endswith("_tokens"))
    assert found == tokens
    samples = sum(v for e in ranks[0]["logs"] for k, v in e.items() if k.endswith("_samples"))
    assert samples == len(seen)


@pytest.mark.parametrize("size", [3, 8, 9, 10, 13])
@pytest.mark.parametrize(
    "case",
    [
        "eval_map",
        "eval_split",
        "eval_dispatch",
        "eval_dispatch_split",
        "eval_stream",
        "eval_flattened",
    ],
)
def test_evaluation_counts_each_record_once(ddp: Launch, case: str, size: int) -> None:
    records = fixed_records(size, seed=size)
    table = token_table(tiny_model(attention_dropout=0.0), records)
    expected = expected_metrics(table, [[r["input_ids"] for r in records]], prefix="eval_")
    for rank in ddp.ranks(case):
        found = channel_values(rank["evaluated"][str(size)], "eval_")
        samples = {key: found.pop(key) for key in list(found) if key.endswith("_samples")}
        assert sum(samples.values()) == size
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-5)
        assert not rank["warned"]


@pytest.mark.parametrize("size", [3, 8, 9, 10, 13])
def test_packed_rows_are_told_by_rows(ddp: Launch, size: int) -> None:
    """Each record is two sequences: counting sequences would cut the evaluation short."""
    counted: dict[str, int] = {}
    for record in fixed_records(size, seed=size):
        for name, labels in (
            (record["channel"], record["labels"][1:8]),
            ("bbu", record["labels"][9:]),
        ):
            supervised = sum(label != -100 for label in labels)
            if supervised:
                counted[name] = counted.get(name, 0) + supervised
    for rank in ddp.ranks("eval_packed"):
        entry = rank["evaluated"][str(size)]
        found = {
            key.removeprefix("eval_").removesuffix("_tokens"): value
            for key, value in channel_values(entry, "eval_").items()
            if key.endswith("_tokens")
        }
        assert found == counted


def test_a_stream_read_by_all_ranks_says_that_it_counts_repetitions(ddp: Launch) -> None:
    """Eight rows a step: what does not fill the last step is filled, and counted."""
    for rank in ddp.ranks("eval_stream_by_all"):
        assert any("counted twice" in warning for warning in rank["warned"])
        for size, rows in ((3, 8), (8, 8), (9, 16), (10, 16), (13, 16)):
            entry = rank["evaluated"][str(size)]
            assert sum(v for k, v in entry.items() if k.endswith("_samples")) == rows


def test_evaluation_sets_have_their_prefixes(ddp: Launch, table: Any) -> None:
    sets = {"a": make_records(7, seed=1), "b": make_records(7, seed=2)}
    for rank in ddp.ranks("eval_sets"):
        for name, records in sets.items():
            own = token_table(tiny_model(attention_dropout=0.0), records)
            prefix = f"eval_{name}_"
            expected = expected_metrics(own, [[r["input_ids"] for r in records]], prefix=prefix)
            entries = [entry for entry in rank["logs"] if f"{prefix}loss" in entry]
            assert len(entries) == 2
            for entry in entries:
                assert channel_values(entry, prefix) == pytest.approx(expected, rel=1e-5)
