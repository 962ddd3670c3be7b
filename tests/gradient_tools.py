"""Models, batches and the oracle of the tests of gradients: one backward pass per sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from channel_metrics import ChannelMetrics
from channel_metrics.capture.last_norm import find_last_norm

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "mistral": SIZES,
    "mixtral": SIZES | {"num_local_experts": 2},
    "gemma": SIZES,
    "gemma2": SIZES,
    "olmo2": SIZES,
    "phi3": SIZES,
    "gpt2": GPT2,
    "gpt_neox": {k: v for k, v in SIZES.items() if k not in {"num_key_value_heads", "head_dim"}},
    "stablelm": SIZES,
}


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind])).to(dtype)
    model.config._experts_implementation = "eager"  # the other one takes no float64
    with torch.no_grad():
        norm: Any = find_last_norm(model)
        norm.weight.add_(torch.randn_like(norm.weight) / 4)
    return model


RECORDS = [
    {"ids": [1, 2, 3, 4, 5], "channel": "a"},
    {"ids": [6, 5, 8, 9], "channel": "b"},
    {"ids": [7, 7, 3, 4, 2, 1], "channel": "a"},
    {"ids": [9, 8, 7, 5], "channel": None},
    {"ids": [4, 8, 11, 5, 13], "channel": "b"},
]


def padded(records: list[Any]) -> dict[str, Any]:
    size = max(len(record["ids"]) for record in records)
    rows = [r["ids"] + [0] * (size - len(r["ids"])) for r in records]
    ids = torch.tensor(rows)
    mask = (ids > 0).long()
    labels = ids.masked_fill(ids == 0, -100).masked_fill(ids == 3, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(records: list[Any]) -> dict[str, Any]:
    """One row; a sequence's first label is masked."""
    ids = [token for record in records for token in record["ids"]]
    places = [i for record in records for i in range(len(record["ids"]))]
    labels = [-100 if at == 0 or t == 3 else t for t, at in zip(ids, places, strict=True)]
    tensors = {"input_ids": ids, "labels": labels, "position_ids": places}
    return {key: torch.tensor([values]) for key, values in tensors.items()}


def exact(model: Any, batches: list[list[Any]], base: Any) -> dict[str, list[list[float]]]:
    """{channel: gradients of its sequences}: one backward pass for each of them."""
    found: dict[str, list[list[float]]] = {}
    weight: Any = find_last_norm(model).weight
    for records in batches:
        given = base(records)
        labels = given["labels"]
        count = int((labels[:, 1:] != -100).sum())
        for number, record in enumerate(records):
            own = torch.full_like(labels, -100)
            if len(labels) > 1:
                own[number] = labels[number]
            else:
                start = sum(len(other["ids"]) for other in records[:number])
                own[:, start : start + len(record["ids"])] = labels[
                    :, start : start + len(record["ids"])
                ]
            logits = model(**{k: v for k, v in given.items() if k != "labels"}).logits
            (gradient,) = torch.autograd.grad(mean_nll(logits, own, count), weight)
            found.setdefault(record["channel"] or "unlabeled", []).append(gradient.tolist())
    return found


def trained(
    metrics: ChannelMetrics, model: Any, batches: list[list[Any]], base: Any
) -> torch.Tensor:
    """Forward and backward of each batch; returns the gradient of the layer.

    The loss is ours, because that of transformers is in float32.
    """
    collate = metrics.collator(base)
    weight: Any = find_last_norm(model).weight
    for records in batches:
        given = collate(records)
        labels = given.pop("labels")
        with metrics.observe(model, given | {"labels": labels}) as seen:
            logits = model(**without_ours(given)).logits
            seen.logits(logits)
        mean_nll(logits, labels).backward()
    grad: torch.Tensor = weight.grad
    return grad


def without_ours(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if not k.startswith("channel")}


def mean_nll(logits: torch.Tensor, labels: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """The sum over the labels / all labels that are supervised, or `count`."""
    count = count or int((labels[:, 1:] != -100).sum())
    flat, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(flat, wanted, reduction="sum") / count


BATCHES = [RECORDS[:3], RECORDS[3:], RECORDS[1:]]


def gradient_metrics(
    gradients: Mapping[str, Sequence[Sequence[float]]],
) -> dict[str, dict[str, float]]:
    """The metrics of {channel: gradients of its sequences}, of a channel and of all."""

    def dot(a: Sequence[float], b: Sequence[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    sums = {
        c: [math.fsum(column) for column in zip(*of, strict=True)] for c, of in gradients.items()
    }
    total = [math.fsum(column) for column in zip(*sums.values(), strict=True)]
    found = {}
    for channel, own in sums.items():
        rest = [x - y for x, y in zip(total, own, strict=True)]
        found[channel] = {
            "grad_share": dot(own, total) / dot(total, total),
            "grad_norm": math.sqrt(dot(own, own) / dot(total, total)),
        }
        if any(rest):
            cosine = dot(own, rest) / math.sqrt(dot(own, own) * dot(rest, rest))
            found[channel]["grad_cosine"] = cosine
        num = len(gradients[channel])
        if num > 1:
            mean = [x / num for x in own]
            squares = math.fsum(dot(g, g) for g in gradients[channel])
            variance = (squares - num * dot(mean, mean)) / (num - 1)
            signal = dot(mean, mean) - variance / num
            if signal > 0:
                found[channel]["grad_noise"] = variance / signal
    return found
