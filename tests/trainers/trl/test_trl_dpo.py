"""DPOTrainer: rewards, margins, accuracies and losses per channel, against each pair alone."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer
from trl_tools import (
    ALPHABETS,
    CHANNELS,
    arguments,
    logs,
    pair_records,
    run,
    sizes,
    tiny_model,
    weights,
    windows,
)

from channel_metrics import MetricsConfig, UnsupportedVersionError
from channel_metrics.trainers.hf import attach, detach
from channel_metrics.trainers.trl.dpo_losses import FORMULAS

pytestmark = [
    # trl 1.16 reads a property that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated"),
]

BETA = 0.3
EVERYTHING = MetricsConfig(metrics=("loss", "samples", "share", "samples_total"))
# A reward is BETA times a difference of float32 sums of tens, where neighbours are 4e-6 apart.
REWARD_ROUNDING = 3e-6


class Batches:
    """The token rows of each batch, chosen before rejected, as the trainer's loss gets them."""

    def __init__(self) -> None:
        self.seen: dict[bool, list[list[tuple[int, ...]]]] = {True: [], False: []}

    def __call__(self, trainer: Any) -> None:
        inner = trainer._compute_loss

        def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            masks = inputs["attention_mask"].bool()
            rows = [tuple(r[m].tolist()) for r, m in zip(inputs["input_ids"], masks, strict=True)]
            self.seen[model.training].append(rows)
            return inner(model, inputs, *args, **kwargs)

        trainer._compute_loss = keep


def dpo(folder: Path, records: Any = None, trainer_class: Any = DPOTrainer, **options: Any) -> Any:
    names = ("prepare", "before", "eval_dataset", "model")
    keywords = {name: options.pop(name) for name in names if name in options}
    keywords.setdefault("model", tiny_model())
    config = DPOConfig(**arguments(folder, **{"beta": BETA, "max_length": 64, **options}))
    records = pair_records(64) if records is None else records
    # Another reference than the model, or all rewards would be 0 at the start.
    keywords["ref_model"] = tiny_model(seed=7)
    return run(trainer_class, config, records, **keywords)


def log_prob(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


def pair_table(records: list[dict[str, Any]]) -> dict[Any, tuple[str, float, float]]:
    """{the tokens of both answers: (channel, reward of chosen, of rejected)}, each pair alone."""
    model, reference = (m.double().eval() for m in (tiny_model(), tiny_model(seed=7)))
    table = {}
    for record in records:
        prompt = list(record["prompt"].encode())
        rewards, rows = [], []
        for side in ("chosen", "rejected"):
            answer = [*record[side].encode(), 257]
            rewards.append(
                BETA * (log_prob(model, prompt, answer) - log_prob(reference, prompt, answer))
            )
            rows.append((*prompt, *answer))
        table[tuple(rows)] = (record["channel"], *rewards)
    return table


def pairs_of(batches: Any) -> list[Any]:
    found = []
    for rows in batches:
        half = len(rows) // 2
        found += list(zip(rows[:half], rows[half:], strict=True))
    return found


def expected(table: Any, pairs: Any, prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name in CHANNELS:
        mine = [table[pair][1:] for pair in pairs if table[pair][0] == name]
        if not mine:
            continue
        n = len(mine)
        values = {
            "rewards/chosen": sum(c for c, _ in mine) / n,
            "rewards/rejected": sum(r for _, r in mine) / n,
            "rewards/margins": sum(c - r for c, r in mine) / n,
            "rewards/accuracies": sum(c > r for c, r in mine) / n,
            "loss": sum(math.log1p(math.exp(r - c)) for c, r in mine) / n,
            "samples": n,
            "share": n / len(pairs),
        }
        found |= {f"{prefix}{name}_{key}": value for key, value in values.items()}
    return found


def test_windows_are_means_over_the_pairs_of_a_channel(tmp_path: Path) -> None:
    """Over two micro-batches of two steps each; TRL's own values are those of all channels."""
    records, batches = pair_records(64), Batches()
    held_out = pair_records(11, seed=3)
    table = pair_table([*records, *held_out])
    trainer = dpo(
        tmp_path,
        records,
        prepare=lambda trainer: attach(trainer, EVERYTHING),
        before=batches,
        learning_rate=0.0,
        eval_dataset=Dataset.from_list(held_out),
        eval_strategy="steps",
        eval_steps=4,
    )
    found = logs(trainer)
    assert len(found) == 2
    totals: dict[str, float] = {}
    entries = [e for e in trainer.state.log_history if "loss" in e]
    for entry, whole, window in zip(found, entries, windows(batches.seen[True], 4), strict=True):
        pairs = pairs_of(window)
        want = expected(table, pairs)
        for name in CHANNELS:
            if f"{name}_samples" in want:
                totals[name] = totals.get(name, 0) + want[f"{name}_samples"]
                want[f"{name}_samples_total"] = totals[name]
        assert entry == pytest.approx(want, rel=1e-4, abs=REWARD_ROUNDING)
        for key in (
            "loss",
            *(f"rewards/{k}" for k in ("chosen", "rejected", "margins", "accuracies")),
        ):
            together = sum(
                entry[f"{name}_{key}"] * entry[f"{name}_samples"]
                for name in CHANNELS
                if f"{name}_samples" in entry
            )
            assert together / len(pairs) == pytest.approx(float(whole[key]), rel=1e-5, abs=1e-6)
    evaluated = logs(trainer, "eval_")
    assert len(evaluated) == 1
    assert evaluated[0] == pytest.approx(
        expected(table, pairs_of(batches.seen[False]), "eval_"), rel=1e-4, abs=REWARD_ROUNDING
    )
    assert sum(v for k, v in evaluated[0].items() if k.endswith("_samples")) == len(held_out)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    runs = [
        dpo(tmp_path, prepare=prepare, model=tiny_model(attention_dropout=0.1))
        for prepare in (None, attach)
    ]
    assert not logs(runs[0]) and logs(runs[1])
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    for plain, ours in zip(*(r.state.log_history for r in runs), strict=True):
        kept = {k: v for k, v in plain.items() if "runtime" not in k and "per_second" not in k}
        assert kept == {k: ours[k] for k in kept}
    # Nothing of ours is left where it was hooked in.
    assert "gather" not in vars(runs[1].accelerator)
    assert type(runs[1].loss_types) is list
    assert type(detach(runs[1])) is DPOTrainer


class Inputs:
    """The batches of the training, as the trainer's loss gets them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, trainer: Any) -> None:
        inner = trainer._compute_loss

        def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(dict(inputs))
            return inner(model, inputs, *args, **kwargs)

        trainer._compute_loss = keep

    def each_alone(self) -> list[tuple[str, dict[str, torch.Tensor]]]:
        """The channel of each pair, and a batch with that pair only."""
        alone = []
        for inputs in self.seen:
            rows = len(inputs["input_ids"])
            for i in range(rows // 2):
                pair = {
                    k: v[[i, i + rows // 2]] if len(v) == rows else v[[i]]
                    for k, v in inputs.items()
                }
                first = chr(inputs["input_ids"][i][inputs["attention_mask"][i].bool()][0])
                (name,) = (n for n, letters in ALPHABETS.items() if first in letters)
                alone.append((name, pair))
        return alone


def losses_and_oracle(folder: Path, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The losses in the log; and the mean of what TRL itself gives for each pair alone."""
    inputs = Inputs()
    options = {"max_steps": 2, "learning_rate": 0.0, **options}
    trainer = dpo(folder, prepare=lambda t: attach(t, EVERYTHING), before=inputs, **options)
    (entry,) = logs(trainer)
    found = {k.removesuffix("_loss"): v for k, v in entry.items() if k.endswith("_loss")}
    plain, losses = detach(trainer), {name: [] for name in CHANNELS}
    batches = inputs.each_alone()
    with torch.no_grad():
        for name, pair in batches:
            losses[name].append(plain._compute_loss(plain.model, pair, False).item())
    assert len(batches) == 16
    return found, {name: sum(of) / len(of) for name, of in losses.items() if of}


SMOOTH = {"label_smoothing": 0.1}
PER_PAIR: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": SMOOTH,
    "nca_pair": {},
    "robust": SMOOTH,
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.2},
    "sigmoid_norm": {},
}
OF_THE_BATCH = {"aot", "aot_unpaired", "sft"}
# trl 0.29 leaves constants out of its f-divergences, and has no sigmoid_norm.
OLD = Version(trl.__version__) < Version("1.0")


@pytest.mark.parametrize("loss_type", [t for t in PER_PAIR if not (OLD and t == "sigmoid_norm")])
def test_every_loss_is_that_of_each_pair_alone(
    tmp_path: Path, loss_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"loss_type": [loss_type], **PER_PAIR[loss_type]}
    found, want = losses_and_oracle(tmp_path, **options)
    assert found == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert not caplog.records


def test_every_loss_type_of_trl_is_known_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Should be one of") as caught:
        dpo(tmp_path, before=lambda t: setattr(t, "loss_types", ["nonsense"]))
    named = set(ast.literal_eval(str(caught.value).split("one of ")[1]))
    assert named == {*PER_PAIR, *OF_THE_BATCH} - ({"sigmoid_norm"} if OLD else set())
    assert set(FORMULAS) == set(PER_PAIR)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "ipo"], "loss_weights": [0.8, 0.3, 0.1]},
        {"loss_type": ["apo_down"], "precompute_ref_log_probs": True},
        {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
        {"loss_type": ["ipo"], "max_length": 10},
        {"loss_type": ["ipo"], "max_length": 10, "truncation_mode": "keep_end"},
        {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
        {"loss_type": ["hinge"], "f_divergence_type": "js_divergence"},
        {"loss_type": ["exo_pair"], "f_divergence_type": "alpha_divergence", **SMOOTH},
        {
            "loss_type": ["robust"],
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.5,
            **SMOOTH,
        },
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_options_that_change_the_loss(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found, want = losses_and_oracle(tmp_path, **options)
    assert found == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert not caplog.records


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["hinge"]},
        {"loss_type": ["ipo"]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.3]},
        {"loss_type": ["discopop"]},
        {"loss_type": ["apo_down"], "precompute_ref_log_probs": True},
    ],
    ids=lambda options: "-".join(options["loss_type"]),
)
def test_losses_add_up_to_the_trainers_own(tmp_path: Path, options: dict[str, Any]) -> None:
    config = MetricsConfig(metrics=("loss", "samples"))
    trainer = dpo(tmp_path, prepare=lambda t: attach(t, config), max_steps=2, **options)
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    pairs = sum(entry.get(f"{name}_samples", 0) for name in CHANNELS)
    together = sum(
        entry.get(f"{name}_loss", 0) * entry.get(f"{name}_samples", 0) for name in CHANNELS
    )
    assert pairs == 16
    assert together / pairs == pytest.approx(float(entry["loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": ["sigmoid", "aot"]}, "no formula per pair for loss_type=['aot']"),
        ({"loss_type": ["aot_unpaired"]}, "no formula per pair for loss_type=['aot_unpaired']"),
        ({"loss_type": ["sigmoid", "sft"]}, "no formula per pair for loss_type=['sft']"),
        ({"use_weighting": True}, "use_weighting=True weights each pair"),
    ],
    ids=["aot", "aot_unpaired", "sft", "weighting"],
)
def test_a_loss_that_does_not_follow_from_the_rewards_is_left_out(
    tmp_path: Path, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = dpo(tmp_path, prepare=attach, max_steps=2, **options)
    (entry,) = logs(trainer)
    assert "bbu_rewards/margins" in entry
    assert not any(key.endswith("_loss") for key in entry)
    (warning,) = caplog.messages
    assert reason in warning


def test_a_window_with_another_loss_than_the_formula_has_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second micro-batch of the first window: its pairs have rewards and no loss."""
    inputs = Inputs()

    def second_is_other(trainer: Any) -> None:
        inner = trainer._compute_loss

        def other(*args: Any, **kwargs: Any) -> Any:
            loss = inner(*args, **kwargs)
            return loss + 0.01 if len(inputs.seen) == 2 else loss

        trainer._compute_loss = other
        inputs(trainer)

    trainer = dpo(tmp_path, prepare=lambda t: attach(t, EVERYTHING), before=second_is_other)
    first, second = logs(trainer)
    names = [name for name, _ in inputs.each_alone()]
    without = set(names[4:8])
    assert without and without < set(names[:16])
    for name in set(names[:16]):
        assert f"{name}_rewards/margins" in first
        assert (f"{name}_loss" in first) is (name not in without)
    assert {name for name in CHANNELS if f"{name}_loss" in second} == set(names[16:])
    (warning,) = caplog.messages
    assert "loss_type=['sigmoid'], the formulas of channel_metrics do not give the loss" in warning


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_a_model_in_half_precision_has_losses(
    tmp_path: Path, loss_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The rewards are rounded to bfloat16 in trl 0.29; the loss from them is as exact as they."""
    trainer = dpo(
        tmp_path,
        model=tiny_model().bfloat16(),
        prepare=lambda t: attach(t, EVERYTHING),
        before=lambda t: t.ref_model.bfloat16(),
        loss_type=[loss_type],
    )
    for entry, whole in zip(
        logs(trainer), [e for e in trainer.state.log_history if "loss" in e], strict=True
    ):
        counts = {name: entry.get(f"{name}_samples", 0) for name in CHANNELS}
        together = sum(count * entry[f"{name}_loss"] for name, count in counts.items() if count)
        assert together / 16 == pytest.approx(float(whole["loss"]), rel=0.02)
    assert not caplog.messages


@pytest.mark.skipif(not OLD, reason="newer TRL has no fused DPO loss of Liger")
@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero"])
def test_ligers_fused_loss_has_the_same_metrics(tmp_path: Path, loss_type: str) -> None:
    """TRL gathers the rewards of Liger's loss in the same way. Compilation is off: no GPU."""
    pytest.importorskip("liger_kernel")
    kernels = ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")
    usual = {"loss_type": [loss_type]}
    liger = {
        **usual,
        "use_liger_kernel": True,
        "liger_kernel_config": dict.fromkeys(kernels, False),
    }

    def watch(trainer: Any) -> object:
        return attach(trainer, EVERYTHING)

    with torch.compiler.set_stance("force_eager"):
        plain, watched = (dpo(tmp_path, prepare=p, **liger) for p in (None, watch))
        assert torch.equal(weights(plain), weights(watched))
        fused = dpo(tmp_path, prepare=watch, learning_rate=0.0, **liger)
    for found, want in zip(
        logs(fused), logs(dpo(tmp_path, prepare=watch, learning_rate=0.0, **usual)), strict=True
    ):
        assert "bbu_loss" in found
        assert found == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_a_formula_that_trl_has_changed_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = dpo(
        tmp_path,
        prepare=attach,
        max_steps=2,
        loss_type=["ipo"],
        f_divergence_type="js_divergence",
    )
    assert ("bbu_loss" in logs(trainer)[0]) is not OLD
    assert ("do not give the loss" in caplog.text) is OLD


def test_the_loss_of_experts_is_not_that_of_a_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Newer TRL adds the experts' auxiliary loss, one number per batch; trl 0.29 does not."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes(num_local_experts=2)))
    trainer = dpo(tmp_path, model=model, prepare=attach, max_steps=2)
    (entry,) = logs(trainer)
    assert ("bbu_loss" in entry) is OLD
    assert ("auxiliary loss of the experts" in caplog.text) is not OLD


def test_other_gathers_are_refused(tmp_path: Path) -> None:
    def shuffle(trainer: Any) -> None:
        gather = trainer._compute_loss

        def first(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            trainer.accelerator.gather(torch.ones(len(inputs["input_ids"]) // 2))
            return gather(model, inputs, *args, **kwargs)

        trainer._compute_loss = first

    with pytest.raises(UnsupportedVersionError, match="in this order"):
        dpo(tmp_path, prepare=attach, before=shuffle)


def test_an_error_in_the_loss_leaves_nothing_behind(tmp_path: Path) -> None:
    met = []

    def nonsense(trainer: Any) -> None:
        trainer.loss_types = ["nonsense"]
        met.append(trainer.accelerator)

    with pytest.raises(ValueError, match="Unknown loss type"):
        dpo(tmp_path, prepare=attach, before=nonsense)
    assert "gather" not in vars(met[0])
