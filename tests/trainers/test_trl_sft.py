"""SFTTrainer: padded, padding-free and packed data, against naive loops over what the model saw."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import Qwen2ForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer
from trl_tools import (
    ALPHABETS,
    CHANNELS,
    EOS,
    arguments,
    logs,
    run,
    text_records,
    tiny_model,
    token_records,
    weights,
    windows,
    word,
)

from channel_metrics import ChannelError, MetricsConfig
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.trl import SFTChannelMetricsMixin

OLD = Version(trl.__version__) < Version("1")
SPLIT = "bfd-requeue" if OLD else "bfd_split"
OF_LETTER = {ord(letter): name for name, letters in ALPHABETS.items() for letter in letters}


class MySFT(SFTChannelMetricsMixin, SFTTrainer):
    pass


class Seen:
    """The inputs of each forward pass with labels, and the model that they met."""

    def __init__(self) -> None:
        self.batches: dict[bool, list[dict[str, Any]]] = {True: [], False: []}

    def __call__(self, trainer: Any) -> None:
        trainer.model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names = ("input_ids", "labels", "attention_mask", "position_ids")
        if kwargs.get("labels") is not None:
            kept = {name: kwargs[name].clone() for name in names if kwargs.get(name) is not None}
            self.batches[model.training].append(kept)


def expected(model: Any, batches: list[dict[str, Any]], prefix: str = "") -> dict[str, float]:
    """Loss, accuracy, tokens, share: one target after the other, its channel read from it."""
    exact = Qwen2ForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    sums: dict[str, list[float]] = {}
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            log_probs = exact(**inputs, use_cache=False).logits.log_softmax(-1)
        for row, labels in enumerate(batch["labels"].tolist()):
            ids = batch["input_ids"][row].tolist()
            for position in range(1, len(labels)):
                target = labels[position]
                if target == -100:
                    continue
                # The end of a text is of the channel of the letter before it.
                letter = target if target != EOS else ids[position - 1]
                entry = sums.setdefault(OF_LETTER[letter], [0.0, 0.0, 0.0])
                row_log_probs = log_probs[row, position - 1]
                entry[0] -= row_log_probs[target].item()
                entry[1] += int(row_log_probs.argmax()) == target
                entry[2] += 1
    total = sum(entry[2] for entry in sums.values())
    found = {}
    for name, (nll, correct, tokens) in sums.items():
        found[f"{prefix}{name}_loss"] = nll / tokens
        found[f"{prefix}{name}_token_acc"] = correct / tokens
        found[f"{prefix}{name}_tokens"] = tokens
        found[f"{prefix}{name}_share"] = tokens / total
    return found


def config(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(**arguments(folder, **{"max_length": 24, **options}))


def sft(folder: Path, trainer_class: Any = SFTTrainer, records: Any = None, **options: Any) -> Any:
    names = ("prepare", "before", "eval_dataset", "model", "channel_metrics")
    keywords = {name: options.pop(name) for name in names if name in options}
    records = text_records(96) if records is None else records
    return run(trainer_class, config(folder, **options), records, **keywords)


LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd"},
    "split": {"packing": True, "packing_strategy": SPLIT, "max_length": 7},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "wrapped_free": {"packing": True, "packing_strategy": "wrapped", "padding_free": True},
    "shuffled": {"packing": True, "shuffle_dataset": True},
}


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


def packed(folder: Path, trainer_class: Any, dataset: Any, **options: Any) -> Any:
    from channel_metrics.tiny import byte_tokenizer

    return trainer_class(
        model=tiny_model(),
        args=config(folder, packing=True, **options),
        train_dataset=dataset,
        processing_class=byte_tokenizer(),
    ).train_dataset


@pytest.mark.parametrize(
    ("strategy", "num_proc", "shuffle"),
    [("bfd", None, True), ("bfd", 2, False), (SPLIT, None, False), ("wrapped", None, True)],
)
def test_packs_are_identical(
    tmp_path: Path, strategy: str, num_proc: int | None, shuffle: bool
) -> None:
    """Every column that TRL makes, row by row; more rows than one batch of the packer."""
    options = {
        "packing_strategy": strategy,
        "max_length": 11,
        "shuffle_dataset": shuffle,
        "dataset_num_proc": num_proc,
    }
    records = Dataset.from_list(text_records(1300))
    theirs = packed(tmp_path, SFTTrainer, records, **options)
    ours = packed(tmp_path, MySFT, records, **options)
    assert set(ours.column_names) == {*theirs.column_names, "channel_ids"}
    for column in theirs.column_names:
        assert ours[:][column] == theirs[:][column]
    for row in ours:
        for token, number in zip(row["input_ids"], row["channel_ids"], strict=True):
            assert token == EOS or OF_LETTER[token] == sorted(CHANNELS)[number]


def test_packs_of_masked_conversations_are_identical(tmp_path: Path) -> None:
    """Masks are packed along, whatever columns the versions keep them in."""
    rng = random.Random(0)
    records = [
        {
            "prompt": word(rng, name, 2, 5),
            "completion": word(rng, name, 2, 9),
            "metadata": {"_fusion_source": name},
        }
        for name in CHANNELS * 10
    ]
    theirs, ours = (packed(tmp_path, c, Dataset.from_list(records)) for c in (SFTTrainer, MySFT))
    assert "metadata" not in ours.column_names
    for column in theirs.column_names:
        assert ours[:][column] == theirs[:][column]


def test_a_stream_is_packed_with_declared_channels(tmp_path: Path) -> None:
    stream = Dataset.from_list(text_records(96)).to_iterable_dataset()
    with pytest.raises(ChannelError, match="must have its channels declared"):
        packed(tmp_path, MySFT, stream)
    seen = Seen()
    trainer = sft(
        tmp_path,
        MySFT,
        stream,
        packing=True,
        before=seen,
        learning_rate=0.0,
        channel_metrics=MetricsConfig(channels=("rru", "bbu", "lang_chat", "lvis")),
    )
    for entry, window in zip(logs(trainer), windows(seen.batches[True], 4), strict=True):
        assert entry == pytest.approx(expected(trainer.model, window), rel=2e-5)


def test_cached_packs_keep_their_names(tmp_path: Path) -> None:
    """From files, a second trainer reads the packs of the first; other data gets other numbers."""
    found = []
    for names in (CHANNELS, CHANNELS, CHANNELS[1:]):
        folder = tmp_path / "_".join(names)
        if not folder.exists():
            rows = [r for r in text_records(96) if r["channel"] in names]
            Dataset.from_list(rows).save_to_disk(folder)
        seen = Seen()
        trainer = sft(
            tmp_path,
            MySFT,
            Dataset.load_from_disk(folder),
            packing=True,
            before=seen,
            learning_rate=0.0,
        )
        for entry, window in zip(logs(trainer), windows(seen.batches[True], 4), strict=True):
            assert entry == pytest.approx(expected(trainer.model, window), rel=2e-5)
        found.append(logs(trainer))
    assert found[0] == found[1] != found[2]


def test_samples_of_packs_are_sequences(tmp_path: Path) -> None:
    records = text_records(24)
    trainer = sft(
        tmp_path,
        MySFT,
        records,
        packing=True,
        num_train_epochs=1,
        max_steps=-1,
        gradient_accumulation_steps=1,
        logging_steps=1,
        channel_metrics=MetricsConfig(metrics=("samples", "samples_total", "tokens_total")),
    )
    last = logs(trainer)[-1]
    for name in CHANNELS:
        mine = [record["text"] for record in records if record["channel"] == name]
        assert sum(entry.get(f"{name}_samples", 0) for entry in logs(trainer)) == len(mine)
        if f"{name}_samples" in last:
            # Every letter but the first, and the end of the text.
            assert last[f"{name}_tokens_total"] == sum(map(len, mine))


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
    from channel_metrics.tiny import byte_tokenizer

    rng = random.Random(0)
    records: list[dict[str, Any]] = []
    for name in CHANNELS * 12:
        prompt, answer = word(rng, name, 2, 5), word(rng, name, 2, 9)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        by_kind = {
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
