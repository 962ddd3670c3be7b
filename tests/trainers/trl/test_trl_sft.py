"""SFTTrainer: padded, padding-free and packed data, against naive loops over what the model saw."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import set_seed
from trl import SFTTrainer
from trl.trainer import sft_trainer
from trl_sft_tools import (
    BFD,
    HAS_BOUNDS,
    HAS_SPLIT,
    OLD,
    SHUFFLES,
    SPLIT,
    MySFT,
    Seen,
    config,
    expected,
    sft,
)
from trl_tools import (
    CHANNELS,
    logs,
    text_records,
    tiny_model,
    token_records,
    weights,
    windows,
    word,
)

from channel_metrics import ChannelError, MetricsConfig, UnsupportedVersionError
from channel_metrics.trainers.hf import attach

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "bfd": {"packing": True, "packing_strategy": BFD},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
}
if HAS_BOUNDS:
    LAYOUTS["padding_free"] = {"padding_free": True, "max_length": None}
    LAYOUTS["wrapped_free"] = LAYOUTS["wrapped"] | {"padding_free": True}
if HAS_SPLIT:
    LAYOUTS["split"] = {"packing": True, "packing_strategy": SPLIT, "max_length": 7}
if SHUFFLES:
    LAYOUTS["shuffled"] = {"packing": True, "shuffle_dataset": True}
# The size of the chunks in TRL's chunked loss.
CHUNKS = "_CHUNKED_LM_HEAD_CHUNK_SIZE"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_hold_what_the_model_saw(tmp_path: Path, layout: str) -> None:
    seen = Seen()
    options = LAYOUTS[layout]
    make = token_records if layout == "split" else text_records
    trainer = sft(
        tmp_path,
        MySFT,
        make(96),
        before=seen,
        learning_rate=0.0,
        eval_dataset=Dataset.from_list(make(29, seed=5)),
        eval_strategy="steps",
        eval_steps=4,
        **options,
    )
    found = logs(trainer)
    batches = windows(seen.batches[True], 4)
    assert len(found) == len(batches) == 2
    for entry, window in zip(found, batches, strict=True):
        assert entry == pytest.approx(expected(trainer.model, window), rel=2e-5)
    evaluated = logs(trainer, "eval_")[-1]
    assert evaluated == pytest.approx(
        expected(trainer.model, seen.batches[False], "eval_"), rel=2e-5
    )


def test_the_best_model_is_chosen_by_an_objective(tmp_path: Path) -> None:
    trainer = sft(
        tmp_path,
        MySFT,
        channel_metrics=MetricsConfig(metrics=("loss", "macro_loss")),
        eval_dataset=Dataset.from_list(text_records(29, seed=5)),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="eval_macro_loss",
    )
    history = trainer.state.log_history
    losses = [entry["eval_macro_loss"] for entry in history if "eval_macro_loss" in entry]
    assert len(losses) == 2 and trainer.state.best_metric == min(losses)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_with_and_without(tmp_path: Path, layout: str) -> None:
    """Data and weights, bit for bit, with dropout."""
    runs = []
    for trainer_class in (SFTTrainer, MySFT):
        seen = Seen()
        model = tiny_model(attention_dropout=0.1)
        trainer = sft(tmp_path, trainer_class, model=model, before=seen, **LAYOUTS[layout])
        runs.append((trainer, seen.batches[True], torch.random.get_rng_state()))
    (plain, plain_batches, plain_rng), (ours, our_batches, our_rng) = runs
    assert not logs(plain) and logs(ours)
    assert torch.equal(weights(plain), weights(ours))
    assert torch.equal(plain_rng, our_rng)
    for theirs, mine in zip(plain_batches, our_batches, strict=True):
        assert theirs.keys() == mine.keys()
        assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    for key in ("loss", "grad_norm", "mean_token_accuracy"):
        values = [[e.get(key) for e in t.state.log_history] for t in (plain, ours)]
        assert values[0] == values[1]


@pytest.mark.skipif(not hasattr(sft_trainer, CHUNKS), reason="for trl 1.4 to 1.14")
def test_the_chunked_loss_in_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 tokens, with masked tokens between the others."""
    monkeypatch.setattr(sft_trainer, CHUNKS, 4)
    records = [
        {"prompt": record["text"][:1], "completion": record["text"][1:]} | record
        for record in text_records(96)
    ]
    for record in records:
        del record["text"]
    found = {}
    for loss_type in ("nll", "chunked_nll"):
        trainer = sft(
            tmp_path,
            MySFT,
            records,
            loss_type=loss_type,
            completion_only_loss=True,
            learning_rate=0.0,
        )
        found[loss_type] = logs(trainer)
    for plain, chunked in zip(found["nll"], found["chunked_nll"], strict=True):
        assert chunked == pytest.approx(plain, rel=1e-6)


@pytest.mark.skipif(HAS_BOUNDS, reason="for trl before 0.24")
def test_padding_free_rows_without_position_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVersionError, match="puts no position ids into padding-free"):
        sft(tmp_path, MySFT, padding_free=True, max_length=None)


def test_attach_after_packing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match=r"was packed by SFTTrainer's constructor.*patches\.trl"):
        sft(tmp_path, prepare=attach, packing=True)


def test_attach_needs_no_more_without_packing(tmp_path: Path) -> None:
    trainer = sft(tmp_path, prepare=attach)
    assert logs(trainer) == logs(sft(tmp_path, MySFT))


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|endoftext|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["completion", "assistant"])
@pytest.mark.parametrize("packing", [False, True])
def test_only_what_is_trained_is_counted(tmp_path: Path, kind: str, packing: bool) -> None:
    from channel_metrics.demo.tiny import byte_tokenizer

    rng = random.Random(0)
    records: list[dict[str, Any]] = []
    for name in CHANNELS * 12:
        prompt, answer = word(rng, name, 2, 5), word(rng, name, 2, 9)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        by_kind: dict[str, dict[str, Any]] = {
            "completion": {"prompt": prompt, "completion": answer},
            "assistant": {"messages": turns},
        }
        records.append(by_kind[kind] | {"channel": name, "size": len(answer) + 1})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    set_seed(0)
    trainer = MySFT(
        model=tiny_model(),
        args=config(
            tmp_path,
            packing=packing,
            assistant_only_loss=kind == "assistant",
            completion_only_loss=kind == "completion",
            max_steps=-1,
            num_train_epochs=1,
            gradient_accumulation_steps=1,
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    masks = {"completion_mask", "assistant_masks", "labels"}
    if OLD and not masks.intersection(trainer.train_dataset.column_names):
        pytest.skip("this trl packs without the masks, and trains on all tokens")
    trainer.train()
    for name in CHANNELS:
        sizes = [record["size"] for record in records if record["channel"] == name]
        assert sum(entry.get(f"{name}_tokens", 0) for entry in logs(trainer)) == sum(sizes)


def test_the_patch_packs_the_channels_of_unmodified_scripts(tmp_path: Path, capfd: Any) -> None:
    from transformers import Trainer

    originals = SFTTrainer._prepare_dataset, Trainer.__init__
    import channel_metrics.patches.trl as patch

    try:
        patched = SFTTrainer._prepare_dataset
        assert patch.is_applied() and patched is not originals[0]
        patch.apply()
        assert SFTTrainer._prepare_dataset is patched
        trainer = sft(tmp_path, packing=True)
        mixed = sft(tmp_path, MySFT, packing=True)
    finally:
        patch.revert()
    assert (SFTTrainer._prepare_dataset, Trainer.__init__) == originals
    patch.revert()
    assert not patch.is_applied()
    assert logs(trainer) == logs(mixed) == logs(sft(tmp_path, MySFT, packing=True))
    patch.apply(MetricsConfig(metrics=("tokens",)))
    try:
        assert {key[-7:] for key in logs(sft(tmp_path, packing=True))[0]} == {"_tokens"}
    finally:
        patch.revert()
    assert "patched trl.SFTTrainer._prepare_dataset" in capfd.readouterr().err


@pytest.mark.parametrize("layout", sorted({"padded", "padding_free", "bfd"} & set(LAYOUTS)))
def test_the_patch_leaves_data_without_channels_alone(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import channel_metrics.patches.trl as patch

    records = [{"text": record["text"]} for record in text_records(48)]
    try:
        patch.apply()
        caplog.clear()
        trainer = sft(tmp_path, records=records, **LAYOUTS[layout])
    finally:
        patch.revert()
    # One warning, whose advice is for this case.
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "channel_metrics"]
    assert "set `fields` to the one that names the source" in warning
    plain = sft(tmp_path, records=records, **LAYOUTS[layout])
    assert not logs(trainer)
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=0, atol=0)
