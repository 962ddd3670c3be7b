"""ms-swift's own trainer: what an evaluation logs where channels are chosen for it."""

from __future__ import annotations

import importlib.util

import pytest
from hf_launch import Launch, launch
from swift_files import CHANNELS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("swift") is None,
    reason="ms-swift is only in the main environment (Python 3.11): `make test` runs this",
)

CHOSEN = ("bbu", "lvis")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return launch("swift", tmp_path_factory)


def test_evaluation_logs_the_channels_that_were_chosen(one: Launch) -> None:
    """The oracle is ms-swift alone, which logs them all, as `eval_loss_{channel}`."""
    (found,) = one.ranks("chosen_in_evaluation")
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
