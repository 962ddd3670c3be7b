"""Qwen2.5-VL and Qwen3-VL in `swift sft`: images and text in one mixture.

One step is a whole epoch, so the first window holds every record, under the weights that the run
began with. The oracle is a loop over the records: one forward each, without padding or packs.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import pytest
import torch
import torch.distributed as dist
from fork_client import Preload
from paths import ROOT
from rank_cases import Case, RanksOf, case
from swift_checks import check_training
from swift_files import arguments
from swift_tools import SWIFT, both_and_template, needs_swift
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from vision_tools import needs_vision

pytestmark = [needs_swift, needs_vision]
VISION = Preload(("vision_tools:load_torchvision", *SWIFT.names))
alone = case(VISION, ranks=1)
in_parts = case(VISION, ranks=2)

SOURCES = ("bbu", "lvis", "lang_chat")
NUM_RECORDS = 6
NAMED = "named.jsonl"
CONFIGS = ROOT / "configs" / "vision_mixture"

PACKED = {"packing": True, "per_device_train_batch_size": 1, "attn_impl": "by_bounds"}
PADDING_FREE = {"padding_free": True, "attn_impl": "by_bounds", "enable_channel_loss": False}
LORA = {
    "tuner_type": "lora",
    "lora_rank": 2,
    "target_modules": ["all-linear"],
    "enable_channel_loss": False,
}
ULYSSES = {"sequence_parallel_size": 2, "ddp_backend": "gloo"}

_shared: dict[str, Path] = {}


def generate() -> Any:
    """The script that writes the mixture of the example."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("generate_vision", CONFIGS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shared(folder: Path, kind: str) -> tuple[Path, Path]:
    """The model and the data of all cases; the ranks of a case share them."""
    from channel_metrics.demo.tiny_vision import save_tiny_vision_model

    base = folder.parent / f"vision{os.getppid()}"
    ranks = dist.is_initialized()
    if not _shared:
        _shared["data"] = base / "train.jsonl"
        if not ranks or dist.get_rank() == 0:
            write_data(base)
    if kind not in _shared:
        # transformers saves on the first rank only.
        _shared[kind] = save_tiny_vision_model(base / kind, kind)
    if ranks:
        dist.barrier()
    return _shared[kind], _shared["data"]


def write_data(base: Path) -> None:
    """The mixture of the example, and again with the column `channel`."""
    path = generate().write_records(base, "train", NUM_RECORDS)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    named = [record | {"channel": channel_of(record)} for record in records]
    path.with_name(NAMED).write_text("".join(json.dumps(record) + "\n" for record in named))


def by_bounds(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attention inside the sequences of a pack, as flash attention computes it on a GPU.

    The sdpa of transformers does not do this for these models: it finds packs by position ids, and
    theirs are those of images.
    """
    bounds = kwargs.pop("cu_seq_lens_q", None)
    if bounds is not None:
        count = query.shape[2]
        sequences = torch.searchsorted(bounds[1:], torch.arange(count), right=True)
        allowed = (sequences[:, None] == sequences) & torch.ones(count, count).tril().bool()
        attention_mask = allowed[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def channel_of(record: dict[str, Any]) -> str:
    name: str = record["metadata"]["_fusion_source"]
    return name


def given(folder: Path, kind: str = "qwen2_5_vl", **overrides: Any) -> dict[str, Any]:
    model, data = shared(folder, kind)
    AttentionInterface.register("by_bounds", by_bounds)
    whole_epoch = {
        "model_type": kind,
        "template": kind,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": NUM_RECORDS,
        "max_steps": 2,
    }
    return arguments(model, data, folder, **whole_epoch | overrides)


def trained(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Without and with our metrics; and what a loop over the records gives."""
    from swift.sequence_parallel import sequence_parallel

    options = given(folder, **overrides)
    # ms-swift alone needs the column `channel`.
    named = [str(Path(options["dataset"][0]).with_name(NAMED))]
    found, template = both_and_template(options, dataset=named)
    # ms-swift's attention must not look for other parts of these rows.
    sequence_parallel.world_size = 1
    return found | {"expected": one_by_one(template, options)}


def one_by_one(template: Any, options: dict[str, Any]) -> dict[str, list[float]]:
    """{channel: [nll, tokens, right]} of a forward for each record."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(options["model"], dtype=torch.float32)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    for line in Path(options["dataset"][0]).read_text().splitlines():
        record = json.loads(line)
        encoded = template.encode(record)
        images = {name: encoded[name] for name in names if encoded.get(name) is not None}
        if images.get("mm_token_type_ids") is not None:
            images["mm_token_type_ids"] = images["mm_token_type_ids"].reshape(1, -1)
        with torch.no_grad():
            logits = model(torch.tensor([encoded["input_ids"]]), **images).logits[0, :-1].double()
        target = torch.tensor(encoded["labels"][1:])
        kept = target != -100
        nll = torch.nn.functional.cross_entropy(logits[kept], target[kept], reduction="sum")
        of = sums[channel_of(record)]
        for at, value in enumerate(
            (float(nll), int(kept.sum()), int((logits.argmax(-1) == target)[kept].sum()))
        ):
            of[at] += value
    return dict(sums)


@alone
def padded(folder: Path) -> Any:
    return trained(folder)


@alone
def padding_free(folder: Path) -> Any:
    return trained(folder, **PADDING_FREE)


@alone
def packing(folder: Path) -> Any:
    return trained(folder, **PACKED)


@alone
def lora(folder: Path) -> Any:
    return trained(folder, **LORA)


@alone
def qwen3(folder: Path) -> Any:
    return trained(folder, kind="qwen3_vl")


@alone
def qwen3_packing(folder: Path) -> Any:
    return trained(folder, kind="qwen3_vl", enable_channel_loss=False, **PACKED)


@alone
def qwen3_padding_free(folder: Path) -> Any:
    return trained(folder, kind="qwen3_vl", **PADDING_FREE)


@alone
def qwen3_lora(folder: Path) -> Any:
    return trained(folder, kind="qwen3_vl", **LORA)


WITH_THE_FLAG = [padded, packing, qwen3]
WITHOUT = [padding_free, lora, qwen3_packing, qwen3_padding_free, qwen3_lora]


def check(found: dict[str, Any], *, flag: bool, loop: bool = True) -> None:
    check_training(found["off"], found["on"])
    first = found["on"]["log"][0]
    assert set(found["expected"]) == set(SOURCES)
    for name, (nll, tokens, right) in found["expected"].items():
        assert first[f"{name}_tokens"] == tokens
        if loop:
            assert first[f"{name}_loss"] == pytest.approx(nll / tokens, rel=1e-5)
            assert first[f"{name}_token_acc"] == right / tokens
        if flag:
            own = found["off"]["log"][0][f"loss_{name}"]
            assert first[f"{name}_loss"] == pytest.approx(own, rel=2e-6)
    shares = [first[f"{name}_share"] for name in SOURCES]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("of", [*WITH_THE_FLAG, *WITHOUT])
def test_against_a_loop_over_the_records(ranks_of: RanksOf, of: Case) -> None:
    (found,) = ranks_of(of)
    check(found, flag=of in WITH_THE_FLAG)


@alone
def example(folder: Path) -> Any:
    """The commands of the example, in this folder: generate.py, then `swift sft`."""
    import channel_metrics.patches.ms_swift as patch
    from swift import sft_main
    from swift.cli import main as swift_cli

    folder.mkdir()
    settings = folder / "metrics.yaml"
    settings.write_text("metrics: [loss, samples]\n")
    plugin = ["--external_plugins", str(ROOT / "patches" / "ms_swift.py")]
    script, command = generate(), [str(CONFIGS / "swift.yaml"), *plugin, "--use_cpu", "true"]
    patch.revert()
    swift_cli.parse_yaml_args(command)
    os.environ["CHANNEL_METRICS_CONFIG"] = str(settings)
    try:
        with chdir(folder):
            script.main(script.FOLDER)
            sft_main(command)
    finally:
        patch.revert()
    lines = (folder / "runs/vision_mixture/run/logging.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_example(ranks_of: RanksOf) -> None:
    """Two epochs, and evaluations: every record once."""
    (log,) = ranks_of(example)
    script = generate()
    evaluated = [entry for entry in log if "eval_loss" in entry]
    assert len(evaluated) >= 2
    for name in SOURCES:
        counts = [entry.get(f"{name}_samples", 0) for entry in log if "loss" in entry]
        assert sum(counts) == 2 * script.NUM_TRAIN / len(SOURCES)
        losses = [entry[f"eval_{name}_loss"] for entry in evaluated]
        assert losses[-1] < losses[0]
    for entry in evaluated:
        assert sum(entry[f"eval_{name}_samples"] for name in SOURCES) == script.NUM_VAL


@in_parts
def ulysses(folder: Path) -> Any:
    return trained(folder, **ULYSSES)


@in_parts
def qwen3_ulysses(folder: Path) -> Any:
    """ms-swift alone fails here with sdpa: the mask of this model is for a part of the rows.

    So this runs without a mask, and the model does not compute what a loop would. But our losses
    must be those that ms-swift trains on.
    """
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    with replaced.object(modeling_qwen3_vl, "create_causal_mask", lambda **_: None):
        return trained(folder, kind="qwen3_vl", **ULYSSES)


@pytest.mark.parametrize("of", [ulysses, qwen3_ulysses])
def test_sequence_parallel(ranks_of: RanksOf, of: Case) -> None:
    for found in ranks_of(of):
        check(found, flag=True, loop=of is ulysses)
