"""Token accuracy, and the loss that somebody else has put into a model: both stay what they are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from distributed import run_ranks


def on_rank() -> Any:
    warnings.simplefilter("ignore")
    from megatron_lm import cpu

    cpu.install()
    import megatron_watch_ranks

    return megatron_watch_ranks.everything()


@pytest.fixture(scope="module")
def found() -> Any:
    return run_ranks(on_rank, 1)[0]


def check(found: Any) -> None:
    assert found["values"] == pytest.approx(found["naive"], rel=1e-6)


@pytest.mark.parametrize("case", ["override", "override_on_top", "class_replaced"])
def test_a_loss_of_somebody_elses_is_called(found: Any, case: str) -> None:
    plain, doubled = found[case]["plain"], found[case]["found"]
    check(plain)
    check(doubled)
    loss = 2 * plain["values"]["bbu_loss"]
    assert doubled["values"] == pytest.approx(plain["values"] | {"bbu_loss": loss}, rel=1e-6)


def test_it_is_called_in_each_forward(found: Any) -> None:
    assert found["override_on_top"]["again"] == found["override_on_top"]["found"]


def test_a_loss_that_is_put_back_is_called(found: Any) -> None:
    """And what watches it does not pile up."""
    check(found["taken_back"]["found"])
    assert found["taken_back"]["found"] == found["taken_back"]["plain"]
    assert found["taken_back"]["is_one_deep"]


def test_a_model_without_a_loss_of_tokens_is_named(found: Any) -> None:
    assert "Unknown has no such method, nor has what it holds" in found["unknown"]


def test_the_language_model_of_a_multimodal_model(found: Any) -> None:
    """Each image takes the place of one token, with four positions."""
    assert found["llava"]["positions"] == 16 + 3
    check(found["llava"])
