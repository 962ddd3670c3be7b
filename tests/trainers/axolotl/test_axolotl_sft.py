"""`axolotl train` against a loop over the samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axolotl_tools import (
    AXOLOTL,
    ONLY_HERE,
    Command,
    Run,
    entries,
    make_files,
    train,
    write_config,
)
from mixture_runs import AXES, NAMES, WHOLE, check, check_axes, same
from rank_cases import RanksOf

pytestmark = [ONLY_HERE, pytest.mark.timeout(900)]

RunOf = Callable[..., Run]
PACKED = {"sample_packing": True, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
SOURCE = {"channel_metrics": {"fields": ["source"], "metrics": ["loss", "tokens", "samples"]}}
LABELS = {"channel_metrics": {"metrics": ["loss", "tokens", "samples"], "axes": AXES}}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    # They need a GPU.
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, files: Path, ranks_of: RanksOf) -> RunOf:
    """Run Axolotl in forked processes."""

    def run(ranks: int = 1, **settings: Any) -> Run:
        folder = tmp_path_factory.mktemp("run")
        config = str(write_config(files, folder, **settings))
        ranks_of.call(AXOLOTL, train, config, ranks=ranks, folder=folder, meet=ranks > 1)
        return Run(folder)

    return run


@pytest.mark.parametrize("ranks", [1, 2])
def test_padded_rows_and_test_datasets(run_of: RunOf, files: Path, ranks: int) -> None:
    from axolotl_oracle import of_sft

    tested = [{**entry, "split": "train"} for entry in entries(files)]
    run = run_of(ranks, **WHOLE, test_datasets=tested, eval_strategy="epoch")
    check(run.values, of_sft(files))
    check(run.evaluation, of_sft(files), "eval_")


def test_entries_with_the_same_name_share_a_channel(
    run_of: RunOf, files: Path, tmp_path: Path
) -> None:
    from axolotl_oracle import of_sft

    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((files / "code.jsonl").read_bytes())
    named = [{**entry, "name": "both"} for entry in entries(files)]
    run = run_of(**WHOLE, datasets=[*named, {"path": str(copy), "type": "input_output"}])
    alone = of_sft(files)
    tokens, samples = (sum(values[at] for values in alone.values()) for at in (1, 2))
    nll = sum(loss * count for loss, count, _ in alone.values())
    check(run.values, {"both": (nll / tokens, int(tokens), int(samples)), "copy": alone["code"]})


@pytest.mark.parametrize("settings", [{}, {"multipack_real_batches": True}])
def test_sample_packing(run_of: RunOf, files: Path, settings: dict[str, Any]) -> None:
    from axolotl_oracle import of_sft

    run = run_of(**WHOLE, **PACKED, **LABELS, **settings)
    wanted = of_sft(files, seen=run.seen)
    check_axes(run.values, wanted, of_sft(files, "source", run.seen))
    assert sum(samples for _, _, samples in wanted.values()) > 30


def test_sample_packing_on_two_ranks(run_of: RunOf, files: Path) -> None:
    from axolotl_oracle import of_sft

    run = run_of(2, **WHOLE, **PACKED)
    check(run.values, of_sft(files, seen=run.seen))


def test_a_column_of_the_users_own_is_the_channel_with_lora(run_of: RunOf, files: Path) -> None:
    from axolotl_oracle import of_sft

    check(run_of(**WHOLE, **SOURCE, **LORA).values, of_sft(files, "source"))


@pytest.mark.parametrize("field", [None, "source"])
def test_texts_that_are_cut_into_rows(run_of: RunOf, files: Path, field: str | None) -> None:
    from axolotl_oracle import of_texts

    texts = entries(files, "completion")
    settings = {**SOURCE, "dataset_num_proc": 2} if field else {}
    run = run_of(**WHOLE, **settings, datasets=texts)
    check(run.values, of_texts(files, field))


def test_training_is_the_same_without_the_plugin(
    run_of: RunOf, files: Path, tmp_path: Path
) -> None:
    """Also if both find the same folder of prepared data, and one dataset is there twice."""
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((files / "code.jsonl").read_bytes())
    settings = {
        "datasets": [*entries(files), {"path": str(copy), "type": "input_output"}],
        "model": "dropout",
        "val_set_size": 0.25,
        "eval_steps": 2,
        "balance_labels": True,
        "dataset_exact_deduplication": True,
        "dataset_prepared_path": str(tmp_path / "prepared"),
    }
    off, on = (run_of(**settings, plugin=plugin) for plugin in (False, True))
    same(on, off)
    found = on.evaluation
    assert sum(found.get(f"eval_{name}_samples", 0) for name in (*NAMES, "copy")) == 12


def test_packed_training_with_lora_is_the_same_without_the_plugin(run_of: RunOf) -> None:
    settings = {**PACKED, **LORA, "model": "dropout"}
    off, on = (run_of(**settings, plugin=plugin) for plugin in (False, True))
    same(on, off)


def test_the_command_starts_two_ranks(files: Path, tmp_path: Path) -> None:
    """With the default launcher. And one with `--launcher python`."""
    from axolotl_oracle import of_sft

    two = Command(files, tmp_path / "two", "--", "--multi_gpu", "--num_processes", "2", **WHOLE)
    one = Command(files, tmp_path / "one", "--launcher", "python", **WHOLE)
    wanted = of_sft(files)
    for run in (two.end(), one.end()):
        check(run.values, wanted)
    assert (tmp_path / "two" / "seen1.json").exists()
    assert "the channels of `datasets:` are chat, code" in one.output


def test_a_stream(run_of: RunOf, files: Path) -> None:
    from axolotl_oracle import of_sft

    run = run_of(**WHOLE, max_steps=6, streaming=True)
    check(run.values, of_sft(files))


def test_a_stream_that_each_of_two_ranks_reads(run_of: RunOf, files: Path) -> None:
    from axolotl_oracle import of_sft

    # Without a seed, Axolotl shuffles each rank's stream in another way.
    stream = {**WHOLE, "max_steps": 3, "streaming": True, "shuffle_merged_datasets": False}
    run = run_of(2, **stream, accelerator_config={"dispatch_batches": False})
    check(run.values, of_sft(files))
    with pytest.raises(AssertionError, match=r"accelerator_config: \{dispatch_batches: false\}"):
        run_of(2, **stream)


def test_records_that_come_with_their_tokens(run_of: RunOf, files: Path, tmp_path: Path) -> None:
    from axolotl_oracle import of_sft, records

    for name in NAMES:
        lines = [json.dumps(tokenized(record)) for record in records(files, name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tokens = [{"path": str(tmp_path / f"{name}.jsonl"), "ds_type": "json"} for name in NAMES]
    check(run_of(**WHOLE, datasets=tokens).values, of_sft(files))


def tokenized(record: dict[str, Any]) -> dict[str, list[int]]:
    """The columns of a row for the trainer."""
    asked, said = (list(part["text"].encode()) for part in record["segments"])
    ids, labels = [*asked, *said], [-100] * len(asked) + said
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_validation_is_split_from_all_channels(
    run_of: RunOf, files: Path, packed: bool, ranks: int
) -> None:
    """The collator of evaluations is another one than that of training."""
    from axolotl_oracle import of_sft

    split = {"val_set_size": 0.25, "eval_sample_packing": packed, "eval_strategy": "epoch"}
    # On two ranks, the packs of held out records are too few for larger batches.
    run = run_of(ranks, **WHOLE, **PACKED, **split, eval_batch_size=2 // ranks)
    wanted = of_sft(files, seen=run.evaluated)
    check(run.evaluation, wanted, "eval_")
    samples = sum(of_channel for _, _, of_channel in wanted.values())
    assert samples == 12 or (packed and samples > 6), (
        "packs of a batch that is not full are left out"
    )
