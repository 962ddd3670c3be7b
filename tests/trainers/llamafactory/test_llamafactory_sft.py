"""`llamafactory-cli train`, stages sft and pt, against a loop over the samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llamafactory_tools import EPOCH, ONLY_HERE, Command, make_files
from mixture_runs import AXES, check, check_axes, check_split, same

pytestmark = [ONLY_HERE, pytest.mark.timeout(900)]

EACH = {"eval_dataset": "code,chat", "eval_on_each_dataset": True}
LORA = {"model": "dropout", "neat_packing": True, "finetuning_type": "lora"}
SPLIT = {"model": "dropout", "val_size": 0.25, "eval_strategy": "steps", "eval_steps": 2}


def on_two(rows: int) -> dict[str, Any]:
    """All rows fit into one step of two ranks, so that none is repeated."""
    return {"ranks": 2, "per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 1}


RANKS = on_two(46)
STREAM = {"streaming": True, "buffer_size": 8, "max_steps": 6, "dataloader_num_workers": 1}
# These are 14 packs.
PACKS = {"neat_packing": True, "per_device_train_batch_size": 7}
STREAMS = {**STREAM, **RANKS, "max_steps": 1}
HELD_OUT = {"val_size": 0.25, "eval_strategy": "epoch"}
TEXTS = {"stage": "pt", "dataset": "code_text,chat_text", "cutoff_len": 32}
COLUMN = {"config": "fields: [source]\nmetrics: [loss, tokens, samples]"}
EXCESS = "metrics: [loss, tokens, samples, excess_loss]"
LABELS = {"config": f"{EXCESS}\naxes: {json.dumps(AXES)}"}
# {run: its arguments}
RUNS: dict[str, dict[str, Any]] = {
    "padded": {**EPOCH, **EACH, "eval_strategy": "epoch", "config": EXCESS},
    "packing": {**EPOCH, "packing": True},
    "neat_packing": {**EPOCH, "neat_packing": True, **LABELS},
    "column": {**EPOCH, **COLUMN, "finetuning_type": "lora"},
    "ranks": {**EPOCH, **RANKS},
    "streaming": {**EPOCH, **STREAM},
    "pt": {**EPOCH, **TEXTS},
    "on": SPLIT,
    "off": {**SPLIT, "patch": False},
    "on, packed": LORA,
    "off, packed": {**LORA, "patch": False},
    "val_size": {**EPOCH, **HELD_OUT},
    "lora, packed": {**EPOCH, "neat_packing": True, "finetuning_type": "lora"},
    "ranks, packed": {**EPOCH, **RANKS, **PACKS},
    "texts": {**EPOCH, **TEXTS, "packing": False},
    "streams": {**EPOCH, **STREAMS, "accelerator_config": {"dispatch_batches": False}},
    "streams, dispatched": {**EPOCH, **STREAMS},
    "ranks, val_size": {**EPOCH, **on_two(34), **HELD_OUT},
    "ranks, each": {**EPOCH, **RANKS, **EACH, "eval_strategy": "epoch"},
    "ranks, pt": {**EPOCH, **on_two(40), **TEXTS},
    "ranks, texts": {**EPOCH, **on_two(48), **TEXTS, "packing": False},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, files: Path) -> dict[str, Command]:
    """All runs, two at a time."""
    folder, names = tmp_path_factory.mktemp("runs"), list(RUNS)
    ended: dict[str, Command] = {}
    for start in range(0, len(names), 2):
        pair = names[start : start + 2]
        started = {n: Command(files, folder / n.replace(", ", "_"), **RUNS[n]) for n in pair}
        ended |= {name: command.end() for name, command in started.items()}
    return ended


def test_the_name_of_a_dataset_is_a_channel(ran: dict[str, Command], files: Path) -> None:
    from llamafactory_oracle import of_sft

    check(ran["padded"].values, of_sft(files))


def test_labels_on_further_axes_of_packed_samples(ran: dict[str, Command], files: Path) -> None:
    from llamafactory_oracle import of_sft

    check_axes(ran["neat_packing"].values, of_sft(files), of_sft(files, "source"))


@pytest.mark.parametrize("name", ["padded", "neat_packing"])
def test_excess_loss(ran: dict[str, Command], files: Path, name: str) -> None:
    """The numbers of the reference model go with their records, also into packs."""
    from llamafactory_oracle import of_excess

    for channel, value in of_excess(files).items():
        assert ran[name].values[f"{channel}_excess_loss"] == pytest.approx(value, rel=1e-5)


def test_samples_of_a_pack_keep_their_channels(ran: dict[str, Command], files: Path) -> None:
    from llamafactory_oracle import of_packs

    # LLaMA-Factory takes one from `cutoff_len`, because each pack ends with padding.
    check(ran["packing"].values, of_packs(files, 95))


def test_a_column_of_the_users_own_is_the_channel_with_lora(
    ran: dict[str, Command], files: Path
) -> None:
    from llamafactory_oracle import of_sft

    check(ran["column"].values, of_sft(files, "source"))


def test_a_stream_counts_the_same_records(ran: dict[str, Command], files: Path) -> None:
    from llamafactory_oracle import of_sft

    check(ran["streaming"].values, of_sft(files))


@pytest.mark.parametrize("name", ["pt", "ranks, pt"])
def test_blocks_of_texts(ran: dict[str, Command], files: Path, name: str) -> None:
    from llamafactory_oracle import of_blocks

    check(ran[name].values, of_blocks(files, 32))


@pytest.mark.parametrize("name", ["padded", "ranks, each"])
def test_each_evaluation_set_has_its_channel(
    ran: dict[str, Command], files: Path, name: str
) -> None:
    from llamafactory_oracle import of_sft

    wanted = of_sft(files)
    (code,) = (entry for entry in ran[name].log if "eval_code_runtime" in entry)
    (chat,) = (entry for entry in ran[name].log if "eval_chat_runtime" in entry)
    check(code, {"code": wanted["code"]}, "eval_code_")
    check(chat, {"chat": wanted["chat"]}, "eval_chat_")


def test_two_ranks_that_llamafactory_starts(ran: dict[str, Command], files: Path) -> None:
    from llamafactory_oracle import of_sft

    check(ran["ranks"].values, of_sft(files))
    assert ran["ranks"].output.count("patched llamafactory.data.loader") == 1, "by one process"


@pytest.mark.parametrize("name", ["", ", packed"])
def test_training_is_the_same_without_the_patch(ran: dict[str, Command], name: str) -> None:
    same(ran[f"on{name}"], ran[f"off{name}"])


def test_validation_is_split_from_all_channels(ran: dict[str, Command]) -> None:
    check_split(ran["on"], 12)


@pytest.mark.parametrize("run", ["val_size", "ranks, val_size"])
def test_what_is_trained_and_what_is_held_out_is_the_whole(
    ran: dict[str, Command], files: Path, run: str
) -> None:
    from llamafactory_oracle import of_sft

    trained, held_out = ran[run].values, ran[run].evaluation
    for name, (loss, tokens, samples) in of_sft(files).items():
        parts = (trained, f"{name}_"), (held_out, f"eval_{name}_")
        assert sum(found[f"{key}tokens"] for found, key in parts) == tokens
        assert sum(found[f"{key}samples"] for found, key in parts) == samples
        nll = sum(found[f"{key}loss"] * found[f"{key}tokens"] for found, key in parts)
        assert nll == pytest.approx(loss * tokens, rel=1e-6)


@pytest.mark.parametrize("name", ["lora, packed", "ranks, packed", "streams"])
def test_combinations_count_the_same_records(
    ran: dict[str, Command], files: Path, name: str
) -> None:
    from llamafactory_oracle import of_sft

    check(ran[name].values, of_sft(files))


@pytest.mark.parametrize("name", ["texts", "ranks, texts"])
def test_texts_alone(ran: dict[str, Command], files: Path, name: str) -> None:
    from llamafactory_oracle import of_texts

    check(ran[name].values, of_texts(files, 32))


def test_a_stream_of_one_process_for_all_is_trained_without_metrics(
    ran: dict[str, Command],
) -> None:
    run = ran["streams, dispatched"]
    assert "dispatch_batches" in run.output
    assert "loss" in run.values or "train_loss" in run.values
    assert not any("code" in key for key in run.values)


def test_data_that_another_run_has_tokenized(files: Path, tmp_path: Path) -> None:
    """With the patch, they keep their channels. Its cache is not that of runs without it."""
    from llamafactory_oracle import of_sft

    shared: dict[str, Any] = {**EPOCH, "overwrite_cache": False, "cache": tmp_path / "cache"}
    saved = {**shared, "tokenized_path": str(tmp_path / "tokenized")}
    runs = {"off": {**shared, "patch": False}, "on": shared, "saves": saved, "loads": saved}
    for name, given in runs.items():
        run = Command(files, tmp_path / name, **given).end()
        if name != "off":
            check(run.values, of_sft(files))
    assert "Loaded tokenized dataset from" in run.output
    assert len(list((tmp_path / "cache").rglob("cache-*.arrow"))) > 1
