"""Cases of ms-swift with use_liger_kernel, on one process, in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# First of all: Triton decides when a kernel is defined whether it will be interpreted.
os.environ["TRITON_INTERPRET"] = "1"

import swift_tools
from hf_case_tools import cases_of
from liger_tools import LOSS_ONLY, Largest
from swift_files import arguments, make_data, make_model

from channel_metrics.demo.tiny import byte_tokenizer

WORLD_SIZE = 1
ENVIRON: dict[str, str] = {}

LIGER: dict[str, Any] = {"use_liger_kernel": True, "liger_kernel_config": LOSS_ONLY}
# The interpreter takes its time for every token.
SMALL = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 128, "system": "be"}
_shared: dict[str, Any] = {}


def _given(folder: Path, data: str = "plain", **overrides: Any) -> dict[str, Any]:
    if not _shared:
        base = folder.parent / "swift_liger"
        base.mkdir()
        _shared.update(model=make_model(base / "model"), data=make_data(base))
        # So that some of its predictions are right.
        trained = _given(base, max_steps=12, learning_rate=3e-2, per_device_train_batch_size=4)
        swift_tools.run(trained, None)["trainer"].model.save_pretrained(_shared["model"])
    return arguments(_shared["model"], _shared["data"][data], folder, **(SMALL | overrides))


def _run(given: dict[str, Any], metrics: Any) -> dict[str, Any]:
    """The log, the weights, and how many rows of logits existed at once."""
    with Largest(len(byte_tokenizer())) as largest:
        found = swift_tools.run(given, metrics)
    parameters = found.pop("trainer").model.parameters()
    norms = [float(p.detach().double().norm()) for p in parameters if p.requires_grad]
    return found | {"norms": norms, "rows": largest.num_rows}


def _compared(folder: Path, **kind: Any) -> dict[str, Any]:
    """own: the channel losses of ms-swift alone, which makes the logits for them. off: ms-swift
    alone with Liger. on, flag: with Liger and metrics, without and with the flag."""

    def given(flag: bool, **more: Any) -> dict[str, Any]:
        return _given(folder, enable_channel_loss=flag, **kind, **more)

    return {
        "own": _run(given(True), None),
        "off": _run(given(False, **LIGER), None),
        "on": _run(given(False, **LIGER), swift_tools.ON),
        "flag": _run(given(True, **LIGER), swift_tools.ON),
    }


def liger_padded(folder: Path) -> Any:
    """The model keeps the last positions; and an evaluation."""
    _given(folder)
    evaluation = {
        "val_dataset": [str(_shared["data"]["plain"]) + "#5"],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 3,
    }
    return _compared(folder, **evaluation)


def liger_packing(folder: Path) -> Any:
    """The model keeps the supervised positions."""
    return _compared(folder, packing=True, per_device_train_batch_size=1)


def liger_padding_free(folder: Path) -> Any:
    return _compared(folder, padding_free=True, use_logits_to_keep=False)


def liger_lora(folder: Path) -> Any:
    return _compared(folder, tuner_type="lora", lora_rank=2, target_modules=["all-linear"])


def liger_weighted(folder: Path) -> Any:
    """Weighted tokens: ms-swift itself makes the logits."""
    given = _given(folder, "react", loss_scale="react", max_length=256, **LIGER)
    return {"off": _run(given, None), "on": _run(given, swift_tools.ON)}


CASES = cases_of(globals())
