"""ms-swift's own trainer: the channels that an evaluation logs, and names that clash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_cases import RanksOf, case
from swift_files import CHANNELS, given, shared_data
from swift_tools import SWIFT, both, needs_swift

from channel_metrics import MetricsConfig

pytestmark = needs_swift
alone = case(SWIFT, ranks=1)

CHOSEN = ("bbu", "lvis")


@alone
def chosen_in_evaluation(folder: Path) -> Any:
    """Two steps, each with an evaluation, which logs two of four channels."""
    options: dict[str, Any] = {
        "val_dataset": [f"{shared_data(folder)['plain']}#29"],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "per_device_eval_batch_size": 4,
    }
    return both(given(folder, **options), MetricsConfig(eval_channels=CHOSEN))


def test_evaluation_logs_the_channels_that_were_chosen(ranks_of: RanksOf) -> None:
    """The oracle is ms-swift alone, which logs them all, as `eval_loss_{channel}`."""
    (found,) = ranks_of(chosen_in_evaluation)
    off, on = found["off"], found["on"]
    assert (on["weights"], on["random"]) == (off["weights"], off["random"])
    pairs = [
        (theirs, ours)
        for theirs, ours in zip(off["log"], on["log"], strict=True)
        if "eval_loss" in ours
    ]
    assert len(pairs) == 2
    for theirs, ours in pairs:
        losses = {name: theirs[f"eval_loss_{name}"] for name in CHANNELS}
        for name, loss in losses.items():
            # ms-swift's own keys are the user's, whatever was chosen for ours.
            assert ours[f"eval_loss_{name}"] == pytest.approx(loss, rel=1e-6)
        named = {n for n in CHANNELS if any(key.startswith(f"eval_{n}_") for key in ours)}
        assert named == set(CHOSEN)
        for name in CHOSEN:
            assert ours[f"eval_{name}_loss"] == pytest.approx(losses[name], rel=1e-6)
        # Shares stay those of all tokens.
        shares = [ours[f"eval_{name}_share"] for name in CHOSEN]
        tokens = [ours[f"eval_{name}_tokens"] for name in CHOSEN]
        assert sum(shares) < 0.9
        assert tokens[0] / shares[0] == pytest.approx(tokens[1] / shares[1])
    # Training logs all channels.
    trained = {n for e in on["log"] for n in CHANNELS if f"{n}_loss" in e}
    assert trained == set(CHANNELS)
