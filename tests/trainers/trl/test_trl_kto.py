"""KTOTrainer: rewards and losses per channel, against each answer alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from contract.pairs import log_prob
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig
from transformers import MixtralConfig, MixtralForCausalLM
from trl import KTOConfig, KTOTrainer
from trl_tools import (
    ALPHABETS,
    CHANNELS,
    Record,
    arguments,
    logs,
    run,
    sizes,
    tiny_model,
    weights,
    windows,
    word,
)

from channel_metrics import MetricsConfig, UnsupportedVersionError
from channel_metrics.trainers.hf import attach, detach

OLD = Version(trl.__version__) < Version("1")
BETA, DESIRABLE, UNDESIRABLE = 0.3, 1.5, 0.5
EVERYTHING = MetricsConfig(metrics=("loss", "samples", "share"))
pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated"),
    # trl 0.29 says where they are defined.
    pytest.mark.filterwarnings("ignore:The `KTO.*` is now located in:FutureWarning"),
]


@dataclass(frozen=True)
class Answer:
    """The tokens of prompt and answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    label: bool = True

    @property
    def channel(self) -> str:
        letter = chr(self.prompt[0])
        return next(name for name, letters in ALPHABETS.items() if letter in letters)

    def reward(self, model: Any, reference: Any) -> float:
        prompt, answer = list(self.prompt), list(self.answer)
        return BETA * (log_prob(model, prompt, answer) - log_prob(reference, prompt, answer))


@dataclass
class Batch:
    """The answers of a batch, and those with the prompt of another, for the KL."""

    answers: list[Answer]
    mismatched: list[Answer]


class Batches:
    """The batches of training and evaluation, as the trainer's loss gets them."""

    def __init__(self) -> None:
        self.seen: dict[bool, list[Batch]] = {True: [], False: []}

    def __call__(self, trainer: Any) -> None:
        name = "get_batch_loss_metrics" if OLD else "_compute_loss"
        inner = getattr(trainer, name)

        def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # That of trl 0.29 and 1.5.
            prefix = "completion_" if "completion_input_ids" in inputs else ""
            batch = Batch(rows(inputs, prefix), rows(inputs, f"KL_{prefix}"))
            self.seen[model.training].append(batch)
            return inner(model, inputs, *args, **kwargs)

        setattr(trainer, name, keep)


def rows(inputs: Any, prefix: str) -> list[Answer]:
    if f"{prefix}input_ids" not in inputs:
        return []
    masks = inputs[f"{prefix}attention_mask"].bool()
    if f"{prefix}labels" in inputs:
        of_answer = inputs[f"{prefix}labels"] != -100
    else:
        of_answer = inputs[f"{prefix}completion_mask"].bool()
    found = []
    for ids, mask, answer, label in zip(
        inputs[f"{prefix}input_ids"], masks, of_answer, inputs["label"], strict=True
    ):
        prompt = tuple(ids[mask & ~answer].tolist())
        found.append(Answer(prompt, tuple(ids[mask & answer].tolist()), bool(label)))
    return found


def kto_records(count: int, seed: int = 0) -> list[Record]:
    """Some batches have no desirable answer; one channel has none at all."""
    rng = random.Random(seed)
    records = []
    for _ in range(count):
        name = rng.choice(CHANNELS)
        label = name != "lvis" and rng.random() < 0.4
        texts = {"prompt": word(rng, name, 2, 6), "completion": word(rng, name, 2, 9)}
        records.append({**texts, "label": label, "channel": name})
    return records


def kto(folder: Path, records: Any = None, **options: Any) -> Any:
    names = ("prepare", "before", "eval_dataset", "model", "ref_model", "peft_config")
    keywords = {name: options.pop(name) for name in names if name in options}
    keywords.setdefault("model", tiny_model())
    if "peft_config" not in keywords:
        # Another reference than the model, or all rewards would be 0 at the start.
        keywords.setdefault("ref_model", tiny_model(seed=7))
    given = {"desirable_weight": DESIRABLE, "undesirable_weight": UNDESIRABLE, "max_length": 64}
    config = KTOConfig(**arguments(folder, **{"beta": BETA, **given, **options}))
    records = kto_records(64) if records is None else records
    return run(KTOTrainer, config, records, **keywords)


def expected(batches: Iterable[Batch], prefix: str = "") -> dict[str, float]:
    """By a loop over the answers, each alone and in float64."""
    models = [tiny_model(seed).double().eval() for seed in (0, 7)]
    found: dict[str, list[tuple[bool, float, float]]] = {}
    count = 0
    for batch in batches:
        of_kl = [answer.reward(*models) for answer in batch.mismatched]
        kl = max(sum(of_kl) / len(of_kl), 0.0) if of_kl else 0.0
        for one in batch.answers:
            reward, count = one.reward(*models), count + 1
            sign, weight = (1, DESIRABLE) if one.label else (-1, UNDESIRABLE)
            loss = weight * (1 - 1 / (1 + math.exp(-sign * (reward - kl))))
            found.setdefault(one.channel, []).append((one.label, reward, loss))
    return {
        f"{prefix}{name}_{key}": value
        for name, mine in found.items()
        for key, value in of_channel(mine, count).items()
    }


def of_channel(mine: list[tuple[bool, float, float]], count: int) -> dict[str, float]:
    values = {
        "loss": sum(loss for *_, loss in mine) / len(mine),
        "samples": len(mine),
        "share": len(mine) / count,
    }
    for kind, label in (("chosen", True), ("rejected", False)):
        rewards = [reward for is_chosen, reward, _ in mine if is_chosen is label]
        if rewards:
            values[f"rewards/{kind}"] = sum(rewards) / len(rewards)
    if "rewards/chosen" in values and "rewards/rejected" in values:
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
    return values


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_windows_are_means_over_the_answers_of_a_channel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, loss_type: str, precomputed: bool
) -> None:
    batches = Batches()
    trainer = kto(
        tmp_path,
        prepare=lambda trainer: attach(trainer, EVERYTHING),
        before=batches,
        loss_type=loss_type,
        learning_rate=0.0,
        precompute_ref_log_probs=precomputed,
        eval_dataset=Dataset.from_list(kto_records(11, seed=3)),
        eval_strategy="steps",
        eval_steps=4,
    )
    found = logs(trainer)
    assert len(found) == 2
    for entry, window in zip(found, windows(batches.seen[True], 4), strict=True):
        assert entry == pytest.approx(expected(window), rel=1e-4, abs=3e-6)
    (evaluated,) = logs(trainer, "eval_")
    assert evaluated == pytest.approx(expected(batches.seen[False], "eval_"), rel=1e-4, abs=3e-6)
    assert sum(v for k, v in evaluated.items() if k.endswith("_samples")) == 11
    assert all(bool(batch.mismatched) is (loss_type == "kto") for batch in batches.seen[True])
    assert not [message for message in caplog.messages if "add up" in message]


def together(entry: dict[str, float]) -> float:
    """The loss of all channels."""
    names = [name for name in CHANNELS if f"{name}_loss" in entry]
    return sum(entry[f"{name}_loss"] * entry[f"{name}_share"] for name in names)


ADAPTERS: dict[str, Any] = {
    "none": None,
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
}
if Version(trl.__version__) >= Version("1.16"):  # trl 0.29, 1.5 and 1.9 cannot train it
    ADAPTERS["prompt"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_training_is_the_same_and_the_losses_add_up(tmp_path: Path, adapter: str) -> None:
    """Also where the reference is the model without its adapter."""
    options = {"peft_config": ADAPTERS[adapter]} if adapter != "none" else {}
    runs = [
        kto(tmp_path, prepare=prepare, model=tiny_model(attention_dropout=0.1), **options)
        for prepare in (None, lambda trainer: attach(trainer, EVERYTHING))
    ]
    assert not logs(runs[0]) and torch.equal(weights(runs[0]), weights(runs[1]))
    for plain, ours in zip(*(r.state.log_history for r in runs), strict=True):
        kept = {k: v for k, v in plain.items() if "runtime" not in k and "per_second" not in k}
        assert kept == {k: ours[k] for k in kept}
        if "loss" not in ours:
            continue
        assert together(ours) == pytest.approx(float(ours["loss"]), rel=1e-5)
    assert runs[1].state.log_history[1]["bbu_rewards/rejected"] != 0
    assert type(detach(runs[1])) is KTOTrainer


@pytest.mark.skipif(not OLD, reason="stands in for the fused loss of trl 0.29")
def test_a_loss_without_single_answers_is_refused(tmp_path: Path) -> None:
    """As with Liger, whose kernels need a GPU, and which does not call the watched `kto_loss`."""

    def fused(trainer: Any) -> None:
        inner = type(trainer).get_batch_loss_metrics

        def without(model: Any, inputs: Any) -> Any:
            watched = vars(trainer).pop("kto_loss")
            try:
                return inner(trainer, model, inputs)
            finally:
                trainer.kto_loss = watched

        trainer.get_batch_loss_metrics = without

    with pytest.raises(UnsupportedVersionError, match="set use_liger_kernel=False"):
        kto(tmp_path, prepare=attach, before=fused)


def test_the_loss_of_experts_belongs_to_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in the loss of the batch, and in that of no channel: nothing is compared."""
    sizes_of_experts = sizes(
        num_local_experts=2, output_router_logits=True, router_aux_loss_coef=1.0
    )
    model, reference = (MixtralForCausalLM(MixtralConfig(**sizes_of_experts)) for _ in range(2))
    prepare = partial(attach, config=EVERYTHING)
    # In trl 1.12, the argument counts, and not the number of the model.
    has_argument = "router_aux_loss_coef" in {one.name for one in fields(KTOConfig)}
    weight: dict[str, Any] = {"router_aux_loss_coef": 1.0} if has_argument else {}
    trainer = kto(
        tmp_path, model=model, ref_model=reference, prepare=prepare, max_steps=2, **weight
    )
    assert trainer.aux_loss_enabled
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert float(entry["loss"]) > together(entry) + 0.5
    assert "add up" not in caplog.text


def test_another_formula_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def doubled(trainer: Any) -> None:
        name = "get_batch_loss_metrics" if OLD else "_compute_loss"
        inner = getattr(trainer, name)

        def twice(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

        setattr(trainer, name, twice)

    kto(tmp_path, prepare=attach, before=doubled, max_steps=2)
    assert "own loss: the relative difference is 5.0e-01" in caplog.text
