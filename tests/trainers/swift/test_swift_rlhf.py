"""`swift rlhf`, which has no channel metrics: the run says so, and is the same as without us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_case_tools import weights_hash
from rank_cases import RanksOf, case
from said import warnings_of_ours
from swift_files import arguments, make_model, said
from swift_tools import SWIFT, needs_swift, timeless

from channel_metrics import MetricsConfig

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)


def preferences(folder: Path, kind: str) -> Path:
    """Conversations of two channels: pairs for dpo, labels for kto."""
    records = []
    for index in range(16):
        messages = [{"role": "user", "content": f"say {index}"}, said(f"yes {index}")]
        more = {"label": bool(index % 2)} if kind == "kto" else {"rejected_response": "no"}
        records.append({"messages": messages, "channel": "ab"[index % 2], **more})
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(given: dict[str, Any], *, patched: bool) -> dict[str, Any]:
    import channel_metrics.patches.ms_swift as patch
    from swift import RLHFArguments, rlhf_main
    from swift.pipelines.train.sft import SwiftSft

    kept: list[Any] = []
    train = SwiftSft.train

    def keep(self: Any, trainer: Any) -> Any:
        kept.append(trainer)
        return train(self, trainer)

    SwiftSft.train = keep
    patch.revert()
    if patched:
        patch.apply(MetricsConfig())
    try:
        with warnings_of_ours() as told:
            rlhf_main(RLHFArguments(**given))
    finally:
        SwiftSft.train = train
        patch.revert()
    (trainer,) = kept
    log = [timeless(entry) for entry in trainer.state.log_history]
    return {"log": log, "weights": weights_hash(trainer.model), "told": told}


@alone
def rlhf(folder: Path) -> Any:
    folder.mkdir()
    model = make_model(folder / "model")
    found = {}
    for kind in ("dpo", "kto"):
        data = preferences(folder, kind)
        given = arguments(model, data, folder / kind, rlhf_type=kind, max_steps=2)
        found[kind] = {on: run(given, patched=on == "on") for on in ("off", "on")}
    return found


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_rlhf_says_that_it_has_no_channel_metrics(ranks_of: RanksOf, kind: str) -> None:
    (found,) = ranks_of(rlhf)
    off, on = found[kind]["off"], found[kind]["on"]
    assert (on["log"], on["weights"]) == (off["log"], off["weights"])
    assert len(on["log"]) >= 2
    (told,) = on["told"]
    assert told.startswith("no channel metrics in this run")
    assert f"this is rlhf_type {kind}; --enable_channel_loss has no effect." in told
