"""One run of ms-swift's Megatron trainer whose loss function reports too much, with evaluations."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from megatron_lm.launch import Run
from swift_files import CHANNELS
from swift_megatron_cases import EVALUATION, ON, PADDED, Case

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("swift") is None,
    reason="ms-swift is only in the main environment (Python 3.11): `make test` runs this",
)

CASE = Case(
    "gaps",
    "dp1",
    PADDED | EVALUATION | {"logging_steps": 1},
    ON | {"eval_channels": ["bbu"]},
    observe=("test_swift_megatron_gaps:lie",),
)


def lie() -> Callable[[], Any]:
    """The sum in the report is one per cent too large, and each warning is shown each time."""
    import warnings

    from swift.megatron.trainers.trainer import MegatronTrainer

    loss_func = MegatronTrainer.loss_func

    @functools.wraps(loss_func)
    def lying(self: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.simplefilter("always")
        loss, num_tokens, report = loss_func(self, *args, **kwargs)
        report["loss"][0] *= 1.01
        return loss, num_tokens, report

    MegatronTrainer.loss_func = lying
    return lambda: None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from swift_megatron_launch import Server

    server = Server(tmp_path_factory.mktemp("swift_megatron_gaps"))
    try:
        found = server.train(CASE)
    finally:
        server.close()
    assert not found.failure, found.failure
    return found


def test_a_loss_function_that_lies_is_told(run: Run) -> None:
    """Once for training and once for evaluation at most."""
    assert run.ranks[0].err.count("do not add up") in (1, 2)


def test_evaluations_log_the_channels_of_eval_channels(run: Run) -> None:
    logs = run.ranks[0].seen["logs"]
    evaluations = [log for log in logs if "eval_loss" in log]
    assert len(evaluations) == 2
    for log in evaluations:
        ours = {key for key in log if key.startswith(tuple(f"eval_{name}_" for name in CHANNELS))}
        assert ours == {f"eval_bbu_{m}" for m in ON["metrics"] if m != "tokens_total"}
    assert all(any(key.startswith(f"{name}_") for log in logs for key in log) for name in CHANNELS)
