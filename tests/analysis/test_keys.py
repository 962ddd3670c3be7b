"""Which part of a log key is a channel."""

from __future__ import annotations

import pytest

from analysis.analysis_tools import HOSTILE
from channel_metrics.analysis.readers.keys import GLOBAL, Key, decode_keys
from channel_metrics.core.keys import metric_key
from channel_metrics.core.objectives import OBJECTIVES
from channel_metrics.core.schema import TOKENS

OWN = ("loss", "grad_norm", "learning_rate", "epoch", "train_loss", "num_tokens", "loss_scale")
NAMES = ("bbu", "lang_chat", "a/b", "loss", "token", "eval_x", "v1.5-mix")


@pytest.mark.parametrize("key_format", ["{channel}_{metric}", "{metric}_{channel}"])
@pytest.mark.parametrize("prefix", ["", "eval_", "val_", "train/", "eval/"])
def test_every_metric_of_declared_channels(key_format: str, prefix: str) -> None:
    expected = {
        prefix + metric_key(key_format, name, metric): (name, metric)
        for name in NAMES
        for metric in TOKENS.metric_names
    }
    decoded = decode_keys([*expected, *(prefix + key for key in OWN)], NAMES)
    split = "eval" if "val" in prefix else "train"
    for key, (name, metric) in expected.items():
        assert decoded[key] == Key(split, name, metric)
    for key in OWN:
        assert decoded[prefix + key] == Key(split, GLOBAL, key)


def test_channels_are_found_by_their_metrics() -> None:
    keys = [f"{n}_{m}" for n in ("bbu", "rru") for m in ("loss", "token_acc", "tokens", "share")]
    decoded = decode_keys([*keys, *OWN, "aux_loss", "router_z_loss", "reg_loss"])
    assert {key.channel for key in decoded.values()} == {"bbu", "rru", GLOBAL}
    assert decoded["aux_loss"] == Key("train", GLOBAL, "aux_loss")


def test_a_loss_alone_is_a_channel_where_no_key_says_more() -> None:
    decoded = decode_keys(["loss", "loss_bbu", "loss_lang_chat", "loss_scale", "eval_loss_bbu"])
    assert decoded["loss_bbu"] == Key("train", "bbu", "loss")
    assert decoded["eval_loss_bbu"] == Key("eval", "bbu", "loss")
    assert decoded["loss_scale"].channel == GLOBAL


def test_one_value_under_two_keys_is_taken_once_and_ours_wins() -> None:
    keys = ["loss_bbu", "bbu_loss", "bbu_tokens"]
    assert set(decode_keys(keys)) == set(decode_keys(keys[::-1])) == {"bbu_loss", "bbu_tokens"}


def test_the_keys_of_other_trainers() -> None:
    decoded = decode_keys(["lm loss", "lm loss validation", "mean_token_accuracy", "grad norm"])
    assert decoded["lm loss"] == Key("train", GLOBAL, "loss")
    assert decoded["lm loss validation"] == Key("eval", GLOBAL, "loss")
    assert decoded["mean_token_accuracy"] == Key("train", GLOBAL, "token_acc")


def test_probes_are_a_split_of_their_own_and_a_name_alone_makes_none() -> None:
    keys = ["train/dataset_canary_loss", "train/dataset_canary_loss_low", "train/bbu_loss"]
    assert decode_keys(keys)[keys[0]] == Key("probe", "canary", "loss")
    assert decode_keys(["dataset_a_loss", "dataset_a_tokens"])["dataset_a_loss"].split == "train"
    # A channel with error bars, whose name looks like a probe's.
    bars = ["dataset_a_loss", "dataset_a_loss_low", "dataset_a_loss_se", "dataset_a_share"]
    assert decode_keys(bars)["dataset_a_loss_low"] == Key("train", "dataset_a", "loss_low")
    assert decode_keys(bars[:2], ["dataset_a"])["dataset_a_loss"] == Key(
        "train", "dataset_a", "loss"
    )


def test_objectives_are_of_the_whole_run_and_statistics_of_their_channel() -> None:
    objectives = [o.name for o in OBJECTIVES]
    statistics = ("loss_se", "loss_low", "loss_high", "loss_p50", "bits_per_byte", "token_acc_se")
    own = [f"a_{metric}" for metric in ("loss", "tokens", *statistics)]
    decoded = decode_keys([*objectives, *(f"eval_{name}" for name in objectives), *own])
    for name in objectives:
        assert decoded[name] == Key("train", GLOBAL, name)
        assert decoded[f"eval_{name}"] == Key("eval", GLOBAL, name)
    for metric in statistics:
        assert decoded[f"a_{metric}"] == Key("train", "a", metric)
    # Neither is an objective a channel where the losses are all that there is.
    alone = decode_keys(["loss", "loss_web", *objectives])
    assert {key.channel for key in alone.values()} == {GLOBAL, "web"}


def test_names_are_taken_as_declared_and_other_metrics_of_a_channel_are_its_own() -> None:
    decoded = decode_keys(["b_u_loss", "b_u_reward_margin"], ["b u", HOSTILE])
    assert decoded["b_u_loss"] == Key("train", "b u", "loss")
    assert decoded["b_u_reward_margin"] == Key("train", "b u", "reward_margin")


def test_tokens_of_several_names_are_a_mix_and_those_of_trainers_are_none() -> None:
    """So `bbu_tokens` beside the loss of the run is enough for an estimate."""
    mix = decode_keys(["loss", "bbu_tokens", "rru_tokens", "num_tokens", "aux_loss"])
    assert mix["bbu_tokens"] == Key("train", "bbu", "tokens")
    assert mix["num_tokens"] == Key("train", GLOBAL, "num_tokens")
    assert {key.channel for key in mix.values()} == {"bbu", "rru", GLOBAL}
    own = ["loss", "num_tokens", "prompt_tokens", "completion_tokens", "total_tokens", "bbu_tokens"]
    assert {key.channel for key in decode_keys(own).values()} == {GLOBAL}
    # Losses of channels say more than a mix of other names.
    losses = decode_keys(["loss", "bbu_loss", "bbu_token_acc", "a_tokens", "b_tokens"])
    assert {key.channel for key in losses.values()} == {"bbu", GLOBAL}


def test_evaluation_sets_of_transformers_are_channels_beside_those_of_the_training() -> None:
    keys = ["loss", "bbu_loss", "bbu_tokens", "eval_bbu_loss", "eval_web_loss", "eval_web_runtime"]
    decoded = decode_keys([*keys, "eval_loss", "eval_runtime", "eval_aux_loss"])
    assert decoded["eval_web_loss"] == Key("eval", "web", "loss")
    assert decoded["eval_bbu_loss"] == Key("eval", "bbu", "loss")
    assert decoded["eval_runtime"] == Key("eval", GLOBAL, "runtime")
    assert decoded["eval_aux_loss"] == Key("eval", GLOBAL, "aux_loss")
