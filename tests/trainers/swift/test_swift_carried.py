"""What travels with the records of `swift sft`: record ids, and losses of a reference model.

The oracle is a loop over the records: one forward each, under the weights that the run began with.
One step is a whole epoch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import Case, RanksOf, case
from swift_files import arguments, make_data, make_model
from swift_tools import SWIFT, both_and_template, needs_swift

from channel_metrics import MetricsConfig

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)

NUM_RECORDS = 24
METRICS = ("loss", "excess_loss")
AXES = {"domain": "metadata._fusion_domain"}

Found = dict[str, Any]


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Each fourth has no reference, and one has that of a text with other tokens."""
    lines = make_data(folder)["fused"].read_text().splitlines()[:NUM_RECORDS]
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records):
        known: Found = {
            "ref_nll": 1.7 * number,
            "ref_tokens": len(record["messages"][1]["content"]) + 2,
        }
        if number % 4 == 0:
            known = {"ref_nll": None, "ref_tokens": None}
        record.update(known, number=f"r{number}")
    records[1]["ref_tokens"] += 1
    return records


def trained(folder: Path, **overrides: Any) -> Found:
    """Without and with our metrics, and what the loop gives."""
    folder.mkdir()
    records, model = records_of(folder), make_model(folder / "model", attention_dropout=0.0)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    one_step = {"gradient_accumulation_steps": NUM_RECORDS, "max_steps": 1}
    options = arguments(model, data, folder, **one_step | overrides)
    outliers = {"folder": str(folder / "outliers"), "count": 1, "id_field": "number"}
    config = MetricsConfig(metrics=METRICS, axes=AXES, outliers=outliers)
    found, template = both_and_template(options, config, enable_channel_loss=False)
    lines = (folder / "outliers" / "rank0.jsonl").read_text().splitlines()
    return found | {
        "outliers": [json.loads(line) for line in lines],
        "records": one_by_one(model, template, records),
    }


def one_by_one(path: Path, template: Any, records: list[dict[str, Any]]) -> list[Found]:
    """The records with their own `nll` and `tokens`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = []
    for record in records:
        encoded = template.encode({"messages": record["messages"]})
        with torch.no_grad():
            logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1].double()
        target = torch.tensor(encoded["labels"][1:])
        kept = target != -100
        nll = torch.nn.functional.cross_entropy(logits[kept], target[kept], reduction="sum")
        source = record["metadata"]["_fusion_source"] or "unlabeled"
        of_record = {"nll": float(nll), "tokens": int(kept.sum()), "channel": source}
        found.append(record | of_record)
    return found


def excess(records: list[Found]) -> float:
    known = [record for record in records if record["ref_tokens"] == record["tokens"]]
    tokens: int = sum(record["tokens"] for record in known)
    return math.fsum(r["nll"] - r["ref_nll"] for r in known) / tokens


@alone
def padded(folder: Path) -> Any:
    return trained(folder)


@alone
def padding_free(folder: Path) -> Any:
    return trained(folder, padding_free=True, enable_channel_loss=False)


@alone
def packing(folder: Path) -> Any:
    return trained(folder, packing=True, per_device_train_batch_size=1)


@alone
def stream(folder: Path) -> Any:
    return trained(folder, streaming=True, per_device_train_batch_size=1)


@pytest.mark.parametrize("of", [padded, padding_free, packing, stream])
def test_against_a_loop_over_the_records(ranks_of: RanksOf, of: Case) -> None:
    (found,) = ranks_of(of)
    records, log = found["records"], found["on"]["log"][0]
    assert len({record["channel"] for record in records}) == 5
    for name in {record["channel"] for record in records}:
        own = [record for record in records if record["channel"] == name]
        assert log.get(f"{name}_excess_loss") == pytest.approx(excess(own), rel=1e-5), name
        highest, lowest = (
            pick(own, key=lambda record: record["nll"] / record["tokens"]) for pick in (max, min)
        )
        ids = {line["outlier"]: line["id"] for line in found["outliers"] if line["channel"] == name}
        assert ids == {"highest": highest["number"], "lowest": lowest["number"]}
    for domain in ("target", "source"):
        own = [r for r in records if r["metadata"]["_fusion_domain"] == domain]
        assert log[f"domain/{domain}_excess_loss"] == pytest.approx(excess(own), rel=1e-5)
    said = [text for text in found["on"]["told"] if "excess" in text]
    # A micro-batch of the stream is one record, which may have no reference.
    assert len(said) == (2 if of is stream else 1) and "leaves out sequences" in said[-1]


def test_the_same_training(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(padding_free)
    off, on = found["off"], found["on"]
    assert (on["weights"], on["random"]) == (off["weights"], off["random"])


@pytest.mark.parametrize("of", [padded, packing])
def test_the_flags_own_curves(ranks_of: RanksOf, of: Case) -> None:
    """`loss_{channel}` has the names of the channels."""
    (found,) = ranks_of(of)
    log, names = found["on"]["log"][0], {record["channel"] for record in found["records"]}
    own = {key.removeprefix("loss_") for key in log if key.startswith("loss_")}
    channels = {name.replace("None", "unlabeled") for name in own if "/" not in name}
    assert channels == names
