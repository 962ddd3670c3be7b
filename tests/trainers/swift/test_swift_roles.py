"""Roles of tokens in `swift sft`, from ms-swift's template, against a loop over the tokens.

The oracle reads the role of a token from the text before it. One step is a whole epoch, so the
weights are those that the run began with.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import Case, RanksOf, case
from swift_files import arguments, make_model
from swift_tools import SWIFT, both_and_template, needs_swift

from channel_metrics import MetricsConfig
from channel_metrics.demo.tiny import byte_tokenizer

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)

CONFIG = MetricsConfig(
    metrics=("loss", "tokens"), axes={"role": {"by": "template"}}, live_table=False
)
ANSWERED = r"<\|im_start\|>user\n<tool_response>"
PART = re.compile(
    rf"(?P<ends_call><\|im_end\|>\n)(?={ANSWERED})"
    rf"|(?P<tool>{ANSWERED}.*?<\|im_end\|>\n<\|im_start\|>assistant\n)"
    r"|(?P<user><\|im_start\|>user\n.*?<\|im_end\|>\n<\|im_start\|>assistant\n)"
    r"|(?P<system><\|im_start\|>system\n.*?<\|im_end\|>\n)"
    r"|(?P<thinking><think>.*?</think>\n*)"
    rf"|(?P<assistant>.+?(?:(?=<\|im_end\|>\n{ANSWERED})|<\|im_end\|>\n?))"
    r"|(?P<text>.+)",
    re.DOTALL,
)
NUM_RECORDS = 12
# A token over the border between what is thought and what is said.
MERGED = "\n\nsay"
Found = dict[str, Any]


def records(*, tools: bool) -> list[Found]:
    """Some think, and some have two rounds; with `tools`, some use a tool."""
    found = []
    for number in range(NUM_RECORDS):
        messages = []
        for turn in range(1 + number % 2):
            thought = f"<think>\nwhy {number}\n</think>\n\n" if (number + turn) % 3 else ""
            messages.append({"role": "user", "content": f"ask {number} {turn}"})
            if tools and number % 4 == 0:
                call = {"name": "look", "arguments": {"at": number}}
                messages.append({"role": "tool_call", "content": json.dumps(call)})
                messages.append({"role": "tool_response", "content": "seen"})
            messages.append({"role": "assistant", "content": f"{thought}say {number}"})
        found.append({"messages": messages, "channel": ("bbu", "rru", None)[number % 3]})
    return found


def trained(
    folder: Path, *, tools: bool = True, chat: bool = True, merges: bool = False, **overrides: Any
) -> Found:
    """chat: `swift sft`; else `swift pt`, in which the last message is the whole text.

    merges: whether the tokenizer knows `MERGED`.
    """
    folder.mkdir()
    data_set = records(tools=tools)
    if not chat:
        overrides["use_chat_template"] = False
        data_set = [record | {"messages": record["messages"][-1:]} for record in data_set]
    tokenizer = byte_tokenizer()
    if merges:
        tokenizer.add_tokens([MERGED])
    model, data = folder / "model", folder / "train.jsonl"
    make_model(model, attention_dropout=0.0, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    data.write_text("".join(json.dumps(record) + "\n" for record in data_set))
    one_step = {"gradient_accumulation_steps": NUM_RECORDS, "max_steps": 1, "max_length": 500}
    options = arguments(model, data, folder, **one_step | overrides)
    found, template = both_and_template(options, CONFIG)
    return found | {"expected": one_by_one(model, template, data_set)}


def roles_of(template: Any, ids: list[int]) -> list[str]:
    texts = [template.tokenizer.decode([token]) for token in ids]
    of_letters = [part.lastgroup for part in PART.finditer("".join(texts)) for _ in part.group()]
    return [str(of_letters[sum(map(len, texts[:number]))]) for number in range(len(ids))]


def one_by_one(path: Path, template: Any, data_set: list[Found]) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    losses: dict[str, list[float]] = {}
    for record in data_set:
        encoded = template.encode({"messages": record["messages"]})
        limit, template.max_length = template.max_length, None
        whole = roles_of(template, template.encode({"messages": record["messages"]})["input_ids"])
        # ms-swift gives the end of a call and what the tool returned as one part.
        of_call = "tool" if template.loss_scale.base_strategy == "all" else "assistant"
        meant = {"ends_call": of_call, "text": "assistant"}
        whole = [meant.get(role, role) for role in whole]
        if MERGED in template.tokenizer.convert_ids_to_tokens(encoded["input_ids"]):
            whole = ["unlabeled"] * len(whole)
        template.max_length = limit
        ids, target = encoded["input_ids"], torch.tensor(encoded["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        for role, one, label in zip(whole[1:], nll, target, strict=False):
            if label != -100:
                losses.setdefault(role, []).append(float(one))
    return {
        f"role/{role}_{metric}": value
        for role, of in losses.items()
        for metric, value in (("loss", sum(of) / len(of)), ("tokens", float(len(of))))
    }


@alone
def padded(folder: Path) -> Any:
    return trained(folder)


@alone
def packing(folder: Path) -> Any:
    return trained(folder, packing=True, per_device_train_batch_size=1)


@alone
def all_roles(folder: Path) -> Any:
    """ms-swift trains on all tokens, and cuts the end of long records off."""
    cut: Found = {"truncation_strategy": "right", "max_length": 150, "enable_channel_loss": False}
    return trained(folder, tools=False, padding_free=True, loss_scale="all", **cut)


@alone
def all_roles_with_tools(folder: Path) -> Any:
    return trained(folder, loss_scale="all", enable_channel_loss=False)


@alone
def pretraining(folder: Path) -> Any:
    return trained(folder, chat=False, enable_channel_loss=False)


@alone
def merged(folder: Path) -> Any:
    return trained(folder, merges=True)


@alone
def stream(folder: Path) -> Any:
    return trained(folder, streaming=True, per_device_train_batch_size=1)


@pytest.mark.parametrize(
    "of", [padded, packing, all_roles, all_roles_with_tools, pretraining, merged, stream]
)
def test_against_a_loop_over_the_tokens(ranks_of: RanksOf, of: Case) -> None:
    (found,) = ranks_of(of)
    off, on = found["off"], found["on"]
    log = {key: value for key, value in on["log"][0].items() if key.startswith("role/")}
    assert log == pytest.approx(found["expected"], rel=1e-5)
    roles = {"assistant", "thinking"}
    if of in (all_roles, all_roles_with_tools):
        roles |= {"user", "system"}
    if of is all_roles_with_tools:
        roles.add("tool")
    if of is merged:  # what is thought merges with what is said
        roles = {"assistant", "unlabeled"}
    assert {key.split("/")[1].split("_")[0] for key in log} == roles
    assert {"bbu_loss", "rru_loss", "unlabeled_loss"} < on["log"][0].keys()
    said = [text for text in on["told"] if "role" in text]
    assert len(said) == (of is merged)
    assert all("does not tell the roles of the tokens of some records" in text for text in said)
    assert (on["weights"], on["random"]) == (off["weights"], off["random"])
