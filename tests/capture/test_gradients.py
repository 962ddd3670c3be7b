"""The gradient of the last normalisation layer per channel, against autograd for each channel."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from gradient_tools import (
    BATCHES,
    MODELS,
    RECORDS,
    exact,
    gradient_metrics,
    model_of,
    packed,
    padded,
    trained,
)
from hf_tools import tiny_model
from no_sync import NoSync
from operators import operators_of
from paths import ROOT
from session_tools import new
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from channel_metrics import ConfigError
from channel_metrics.capture.gradients import (
    GradientTable,
    _of_sequences,
    _products,
)
from channel_metrics.capture.last_norm import find_last_norm
from channel_metrics.core.gradients import GRADIENTS
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.micro_batch import MicroBatch

NAMES = tuple(metric.name for metric in GRADIENTS)


@pytest.mark.parametrize("base", [padded, packed])
@pytest.mark.parametrize("kind", MODELS)
def test_channels_equal_autograd(kind: str, base: Any) -> None:
    model = model_of(kind)
    expected = exact(model, BATCHES, base)
    metrics = new(metrics=("loss", *NAMES))
    metrics.gradients.watch(model)
    total = trained(metrics, model, BATCHES, base)
    found = metrics.gradients.table
    assert found is not None and found.labels.names == ("a", "b")
    limit, sums = 1e-7 * float(total.norm()), found.sums()
    for name, row in zip(("unlabeled", "a", "b"), sums, strict=True):
        own = torch.tensor(expected[name], dtype=torch.float64)
        assert float((row[2:] - own.sum(0)).abs().max()) < limit
        assert float(row[0]) == len(own)
        assert float(row[1]) == pytest.approx(float(own.square().sum()), rel=2e-7)
    assert float((sums[:, 2:].sum(0) - total).abs().max()) < limit


def test_what_is_logged() -> None:
    model = model_of("llama")
    expected = gradient_metrics(exact(model, BATCHES, padded))
    metrics = new(metrics=NAMES, axes={"kind": {"a": "x", "b": "x"}})
    metrics.gradients.watch(model)
    trained(metrics, model, BATCHES, padded)
    window = metrics.close(1)
    for name in ("a", "b", "unlabeled"):
        assert window.values[name] == pytest.approx(expected[name], rel=1e-6), name
    assert sum(values["grad_share"] for values in window.values.values()) == pytest.approx(1.0)
    share = window.logs["a_grad_share"] + window.logs["b_grad_share"]
    assert window.logs["kind/x_grad_share"] == pytest.approx(share)
    assert metrics.close(2).logs == {}
    trained(metrics, model, BATCHES[2:], padded)
    alone = gradient_metrics(exact(model, BATCHES[2:], padded))
    assert metrics.close(3).values["a"] == pytest.approx(alone["a"], rel=1e-6)


def test_the_noise_scale_is_that_of_the_draws() -> None:
    """Gradients with mean (1, 0) and a variance of 4 in each of 2 directions: 8 / 1."""
    torch.manual_seed(0)
    draws = torch.randn(200_000, 2, dtype=torch.float64) * 2 + torch.tensor([1.0, 0.0])
    found = gradient_metrics({"a": draws.tolist()})["a"]
    assert found["grad_noise"] == pytest.approx(8.0, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_training_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    found = []
    for names in ((), NAMES):
        model = model_of("qwen2", dtype)
        metrics = new(metrics=("loss", *names))
        metrics.gradients.watch(model)
        trained(metrics, model, BATCHES, padded)
        found.append([parameter.grad for parameter in model.parameters()])
        assert ("a_grad_share" in metrics.close(1).logs) == bool(names)
    assert all(torch.equal(off, on) for off, on in zip(*found, strict=True))


def test_off_is_free() -> None:
    """Without these metrics, a watched model runs as one that nothing has watched."""
    found = {}
    for names, watches in (((), False), ((), True), (NAMES, True)):
        model, metrics = model_of("llama"), new(metrics=("loss", *names))
        if watches:
            metrics.gradients.watch(model)

        def step(model: Any = model, metrics: Any = metrics) -> None:
            trained(metrics, model, BATCHES[:1], padded)

        step()
        found[bool(names), watches] = operators_of(step)
        norm: Any = find_last_norm(model)
        assert bool(norm._forward_hooks) == bool(names)
        assert (metrics.gradients.table is None) == (not names)
    assert found[False, True] == found[False, False]
    assert len(found[True, True]) > len(found[False, False]) > 0


def test_evaluations_and_forwards_without_a_backward_pass_do_not_count() -> None:
    model = model_of("llama")
    metrics, alone = new(metrics=NAMES), new(metrics=NAMES)
    for session in (metrics, alone):
        model = model_of("llama")
        session.gradients.watch(model)
        if session is metrics:
            given = session.collator(padded)(RECORDS)
            with session.evaluation("eval", 1), session.observe(model, given):
                model(**given)
            given = session.collator(padded)(RECORDS)
            with session.observe(model, given) as seen:
                model(**given)
                seen.discard()
        trained(session, model, BATCHES, padded)
    assert metrics.close(1).logs == alone.close(1).logs != {}


def test_two_forwards_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama")
    metrics = new(metrics=("loss", *NAMES))
    metrics.gradients.watch(model)
    given = metrics.collator(padded)(RECORDS)
    before = model(input_ids=given["input_ids"]).logits.sum()
    with caplog.at_level(logging.WARNING), metrics.observe(model, given):
        loss = model(**given).loss
    (loss + before).backward()
    assert "a_grad_share" not in metrics.close(1).logs
    assert "2 forwards with gradients were seen in place of one" in caplog.text


def test_a_session_without_a_model_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama")
    metrics = new(metrics=("loss", "grad_share"))
    with caplog.at_level(logging.WARNING):
        trained(metrics, model, BATCHES, padded)
        assert set(metrics.close(1).logs) == {"a_loss", "b_loss", "unlabeled_loss"}
    (said,) = [r.getMessage() for r in caplog.records if "grad_" in r.getMessage()]
    assert "call `metrics.gradients.watch(model)`" in said


def test_positions_that_are_not_those_of_the_losses_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of("llama")
    metrics = new(metrics=("loss", *NAMES))
    metrics.gradients.watch(model)
    given = metrics.collator(padded)(RECORDS)
    with caplog.at_level(logging.WARNING), metrics.observe(model, given) as seen:
        logits = model(input_ids=given["input_ids"][:, :-1]).logits
        seen.logits(logits)
    logits.sum().backward()
    assert "a_grad_share" not in metrics.close(1).logs
    assert "the layer had [5, 5, 16], for losses of [5, 6]" in caplog.text


@pytest.mark.parametrize("bounds", [None, torch.tensor([0, 2, 6], dtype=torch.int32)])
def test_nothing_waits_for_the_device(bounds: torch.Tensor | None) -> None:
    on_meta = torch.zeros(2, 3, 4, device="meta")
    bounds = bounds if bounds is None else bounds.to("meta")
    ids = torch.zeros(2, dtype=torch.int64, device="meta")
    table = GradientTable(LabelTable(["a"]), 4)
    table.to("meta")
    batch = MicroBatch(token_losses=on_meta[..., 0], channels=ids, cu_seqlens=bounds)
    with NoSync():
        gradients, whole = _of_sequences(_products(on_meta, on_meta), batch)
        table.add_gradients(ids, gradients, whole=whole)
    assert whole


def test_the_page() -> None:
    text = (ROOT / "docs/gradients.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})


def test_a_gradient_that_is_not_finite_is_absent() -> None:
    model = model_of("llama")
    metrics = new(metrics=("tokens", *NAMES))
    metrics.gradients.watch(model)
    given = metrics.collator(padded)(RECORDS)
    with metrics.observe(model, given):
        loss = model(**given).loss
    (loss * math.nan).backward()
    assert not [key for key in metrics.close(1).logs if "grad" in key]


def test_a_compiled_model_has_none() -> None:
    model = tiny_model(attention_dropout=0.0)
    metrics = new(metrics=("loss", *NAMES))
    metrics.gradients.watch(model)
    compiled: Any = torch.compile(model, backend="eager")
    given = metrics.collator(padded)(RECORDS)
    with metrics.observe(compiled, given):
        loss = compiled(**given).loss
    loss.backward()
    assert "a_loss" in (logs := metrics.close(1).logs) and "a_grad_share" not in logs


def odd() -> Any:
    model = model_of("llama")

    class OddNorm(type(find_last_norm(model))):  # type: ignore[misc]  # a class that is given
        def forward(self, hidden: torch.Tensor) -> Any:
            return super().forward(hidden) * self.weight

    find_last_norm(model).__class__ = OddNorm
    return model


OPT = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1}
OPT |= {"num_attention_heads": 2, "word_embed_proj_dim": 16}
BERT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 2}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.nn.Linear(2, 2), "for Linear: it is no causal language model"),
        (
            lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **BERT)),
            "it is no causal language model of transformers",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **OPT)),
            "OPTDecoder has 0 normalisation layers after its blocks",
        ),
        (odd, "its OddNorm is not b"),
    ],
)
def test_not_for_this_model(make: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        new(metrics=NAMES).gradients.watch(make())
    new(metrics=("loss",)).gradients.watch(make())
