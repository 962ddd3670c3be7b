"""Labels of single tokens in SFTTrainer: from a column of the data, and from TRL's own masks.

Which label a token has can be read from its letter, so the oracle needs no column.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_trl_sft import TEMPLATE
from trl import SFTTrainer
from trl_sft_tools import BFD, OLD, SPLIT, MySFT, Seen, config, expected, sft
from trl_tools import ALPHABETS, CHANNELS, tiny_model, token_records, windows

from channel_metrics import ChannelError, MetricsConfig
from channel_metrics.demo.tiny import byte_tokenizer
from channel_metrics.trainers.hf import attach

LETTERS = "".join(ALPHABETS.values())
# {letter: label}, None for a letter without one
ROLES = {ord(letter): ("user", "assistant", None)[ord(letter) % 3] for letter in LETTERS}
CONFIG = MetricsConfig(
    channels=CHANNELS, axes={"role": {"by": "column", "field": "roles"}}, live_table=False
)
# Records of two channels have one label, and those of the last channel have none.
LANGUAGES = dict(zip(CHANNELS, ("en", "de", "en", None), strict=True))
OF_LANGUAGE = {
    ord(letter): f"lang/{LANGUAGES[name] or 'unlabeled'}"
    for name, letters in ALPHABETS.items()
    for letter in letters
}
OF_ROLE = {letter: f"role/{role or 'unlabeled'}" for letter, role in ROLES.items()}


def records(count: int = 96) -> list[dict[str, Any]]:
    return [
        {
            **record,
            "roles": [ROLES[token] for token in record["input_ids"]],
            "lang": LANGUAGES[record["channel"]],
        }
        for record in token_records(count)
    ]


def run(folder: Path, data: Any, chosen: MetricsConfig, trainer_class: Any, **options: Any) -> Any:
    """The trainer, and what its model saw."""
    seen = Seen()
    if trainer_class is MySFT:
        options["channel_metrics"] = chosen
    else:
        options["prepare"] = lambda trainer: attach(trainer, chosen)
    # trl 0.29 cuts all lists of a record, trl 1.16 only those that it knows.
    length = 11 if OLD or options.get("packing") else None
    options = {"learning_rate": 0.0, "before": seen, "max_length": length, **options}
    return sft(folder, trainer_class, data, **options), seen


def check(trainer: Any, seen: Seen, axis: str, names: dict[int, str]) -> None:
    entries = [
        {key: value for key, value in entry.items() if key.startswith(f"{axis}/")}
        for entry in trainer.state.log_history
    ]
    entries = [entry for entry in entries if entry]
    wanted = windows(seen.batches[True], 4)
    assert len(entries) == len(wanted) == 2
    for entry, window in zip(entries, wanted, strict=True):
        assert entry == pytest.approx(expected(trainer.model, window, names=names), rel=2e-5)


@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [
        (SFTTrainer, {}),
        (SFTTrainer, {"padding_free": True}),
        (MySFT, {"packing": True, "packing_strategy": BFD}),
        (MySFT, {"packing": True, "packing_strategy": "wrapped"}),
        (MySFT, {"packing": True, "packing_strategy": SPLIT}),
    ],
    ids=["padded", "padding-free", "bfd", "wrapped", "split"],
)
def test_labels_of_tokens_and_of_records(
    tmp_path: Path, trainer_class: Any, options: dict[str, Any]
) -> None:
    chosen = replace(CONFIG, axes={**CONFIG.axes, "lang": "lang"})
    trainer, seen = run(tmp_path, records(), chosen, trainer_class, **options)
    check(trainer, seen, "role", OF_ROLE)
    check(trainer, seen, "lang", OF_LANGUAGE)


def test_a_stream_is_packed_with_roles(tmp_path: Path) -> None:
    stream = Dataset.from_list(records()).to_iterable_dataset()
    trainer, seen = run(tmp_path, stream, CONFIG, MySFT, packing=True)
    check(trainer, seen, "role", OF_ROLE)


@pytest.mark.parametrize("packing", [False, True])
def test_prompts_and_completions(tmp_path: Path, packing: bool) -> None:
    """TRL makes the column `completion_mask` itself; here it trains on prompts, too."""
    rng = random.Random(0)
    data = []
    for name in CHANNELS * 24:
        first, second = (ALPHABETS[name][:3], ALPHABETS[name][3:])
        prompt, completion = (
            "".join(rng.choice(letters) for _ in range(rng.randint(2, 7)))
            for letters in (first, second)
        )
        data.append({"prompt": prompt, "completion": completion, "channel": name})
    axis = {"by": "column", "field": "completion_mask", "labels": {0: "prompt", 1: "completion"}}
    chosen = MetricsConfig(channels=CHANNELS, axes={"part": axis}, live_table=False)
    trainer, seen = run(
        tmp_path, data, chosen, MySFT, packing=packing, completion_only_loss=False, max_length=24
    )
    names = {
        ord(letter): f"part/{'prompt' if letters.index(letter) < 3 else 'completion'}"
        for letters in ALPHABETS.values()
        for letter in letters
    }
    check(trainer, seen, "part", names)


def test_assistant_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TRL trains on the tokens of the assistant only; trl 1.16 drops the masks then."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = [
        {
            "messages": [
                {"role": "user", "content": ALPHABETS[name][:4]},
                {"role": "assistant", "content": ALPHABETS[name]},
            ],
            "channel": name,
        }
        for name in CHANNELS * 24
    ]
    labels = {0: "user", 1: "assistant"}
    axes = {"role": {"by": "column", "field": "assistant_masks", "labels": labels}}
    trainer = MySFT(
        model=tiny_model(),
        args=config(tmp_path, assistant_only_loss=True, max_length=99),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        channel_metrics=MetricsConfig(channels=CHANNELS, axes=axes, live_table=False),
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    found = {key for key in entry if key.startswith("role/")}
    label = "role/assistant" if OLD else "role/unlabeled"
    assert found == {f"{label}_{m}" for m in ("loss", "token_acc", "tokens", "share")}
    assert entry[f"{label}_tokens"] == sum(entry[f"{name}_tokens"] for name in CHANNELS)
    assert caplog.text.count("(assistant_masks) are in none of its records") == (not OLD)


def test_roles_that_do_not_fit(tmp_path: Path) -> None:
    data = [{**record, "roles": record["roles"][1:]} for record in records()]
    wrong: list[tuple[Any, dict[str, Any]]] = [(data, {}), (data, {"packing": True})]
    if not OLD:
        wrong.append((records(), {"max_length": 3}))
    for given, options in wrong:
        with pytest.raises(ChannelError, match="field 'roles' of a record must list a label for"):
            run(tmp_path, given, CONFIG, MySFT, **options)
