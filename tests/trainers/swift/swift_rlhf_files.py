"""Models, data and runs for `swift rlhf`; and what a loop over the records gives."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from swift_files import arguments, make_model, said
from swift_tools import run
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from channel_metrics import MetricsConfig

CHANNELS = ("bbu", "rru", "lvis")
NUM_RECORDS = 12
ON = MetricsConfig(metrics=("loss", "samples", "share"), axes={"domain": "metadata._fusion_domain"})

_shared: dict[str, Path] = {}


def write_records(folder: Path) -> None:
    """Pairs, and single answers with a label. A third channel comes in rarely."""
    rng = random.Random(0)
    pairs, answers = [], []
    for index in range(NUM_RECORDS):
        channel = CHANNELS[min(index % 4, 2)]
        messages = [{"role": "user", "content": f"{channel} {index}"}]
        good, bad = (" ".join(rng.choices(["see", "go", channel], k=k)) for k in (3, 2))
        domain = ("target", "source", None)[index % 3]
        metadata = {"metadata": {"_fusion_source": channel, "_fusion_domain": domain}}
        pair = {"messages": [*messages, said(good)], "rejected_response": f"{bad} no"}
        pairs.append(pair | {"margin": 0.25 * (index % 3)} | metadata)
        answers.append(
            {"messages": [*messages, said(f"{good} {index}")], "label": index % 3 > 0} | metadata
        )
    for name, records in (("pairs", pairs), ("answers", answers)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)


def shared(folder: Path) -> Path:
    """The folder with models and data; the ranks of a case share it."""
    if not _shared:
        base = folder.parent / f"rlhf{os.getppid()}"
        base.mkdir(exist_ok=True)
        for seed, name in enumerate(("model", "reference")):
            make_model(base / name, seed=seed, attention_dropout=0.0)
        reward_model(base)
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_records(base)
        if dist.is_initialized():
            dist.barrier()
        _shared["base"] = base
    return _shared["base"]


def reward_model(base: Path) -> None:
    from channel_metrics.demo.tiny import byte_tokenizer

    config = Qwen2Config.from_pretrained(base / "model", num_labels=1)
    torch.manual_seed(2)
    Qwen2ForSequenceClassification(config).save_pretrained(base / "reward")
    byte_tokenizer().save_pretrained(base / "reward")


def given(folder: Path, kind: str, **overrides: Any) -> dict[str, Any]:
    """Arguments for a run. Its first step is a whole epoch, with the weights it began with."""
    base = shared(folder)
    data = {"kto": "answers"}.get(kind, "pairs")
    options = {
        "rlhf_type": kind,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": NUM_RECORDS // 2,
        "enable_channel_loss": False,
        "val_dataset": [f"{base / data}.jsonl#5"],
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_on_start": True,
        "eval_steps": 50,
    }
    if kind in ("dpo", "kto"):
        options["ref_model"] = str(base / "reference")
    model = base / ("reward" if kind == "rm" else "model")
    return arguments(model, base / f"{data}.jsonl", folder, **options | overrides)


def both(given: dict[str, Any], metrics: MetricsConfig = ON) -> dict[str, Any]:
    """ms-swift alone, and with our metrics; plain values, and what the records give."""
    found: dict[str, Any] = {"off": run(given, None), "on": run(given, metrics)}
    template = found["on"]["trainer"].template
    found["records"] = one_by_one(template, given)
    for of_run in (found["off"], found["on"]):
        del of_run["trainer"]
    return found


def one_by_one(template: Any, given: dict[str, Any]) -> list[dict[str, Any]]:
    """For each record its channel, and of its answers: log probability, tokens, reward."""
    kind = given["rlhf_type"]
    sides = {"chosen": "chosen", "rejected": "rejected"} if kind != "kto" else {"answer": "chosen"}
    if kind == "rm":
        classifier = AutoModelForSequenceClassification.from_pretrained(given["model"]).double()
        models = {"reward": classifier}
    else:
        names = {"policy": given["model"], "reference": given.get("ref_model")}
        models = {
            name: AutoModelForCausalLM.from_pretrained(path).double()
            for name, path in names.items()
            if path is not None
        }
    found = []
    for line in Path(given["dataset"][0]).read_text().splitlines():
        record = json.loads(line)
        encoded = template.encode(record)
        metadata = record["metadata"]
        values: dict[str, Any] = {"channel": metadata["_fusion_source"]}
        values["domain"] = metadata["_fusion_domain"]
        values |= {key: record[key] for key in ("label", "margin") if key in record}
        for side, prefix in sides.items():
            ids = torch.tensor([encoded[f"{prefix}_input_ids"]])
            labels = encoded.get(f"{prefix}_labels")
            for name, model in models.items():
                values[f"{name} {side}"] = of_answer(model, ids, labels)
            if labels is not None:
                values[f"tokens {side}"] = sum(label != -100 for label in labels[1:])
        found.append(values)
    return found


def of_answer(model: Any, ids: torch.Tensor, labels: list[int] | None) -> float:
    """The log probability of the supervised tokens; the reward, if the model is a classifier."""
    with torch.no_grad():
        logits = model(ids).logits
    if labels is None:
        return float(logits.squeeze())
    target = torch.tensor(labels[1:])
    kept = target != -100
    logps = logits[0, :-1][kept].log_softmax(-1)
    return float(logps.gather(1, target[kept][:, None]).sum())
