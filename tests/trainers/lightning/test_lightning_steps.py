"""What a LightningModule may do in its steps: other losses, two models, manual optimization."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import peft
import pytest
import torch
from hf_tools import VOCABULARY, make_records, tiny_model
from lightning_tools import Module, check, flattened, quiet, run, still_model, weights
from torch.nn.functional import cross_entropy, kl_div

from channel_metrics import (
    ChannelError,
    ChannelMetricsError,
    ConfigError,
    MetricsConfig,
    UnsupportedVersionError,
)
from channel_metrics.trainers.lightning import ChannelMetricsCallback

pytestmark = quiet

RECORDS = make_records(8)
HELD_OUT = make_records(10, seed=1)


def own_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class OwnLoss(Module):
    """Computes its loss from the logits of a transformers model."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = batch.pop("labels")
        return own_loss(self.model(**batch).logits, labels)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.training_step(batch, batch_idx)


def test_an_own_loss_over_the_logits_of_a_transformers_model() -> None:
    found = run(RECORDS, held_out=[HELD_OUT], module=OwnLoss())
    check(found.logs("train")[0], RECORDS)
    check(found.logs("val")[0], HELD_OUT, "val_")


class Bigrams(torch.nn.Module):
    """A network that is no transformers model: logits follow from the token before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.table(ids)
        return logits


class OwnNetwork(Module):
    def __init__(self, returned: str) -> None:
        super().__init__(Bigrams())
        self.returned = returned

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits, labels = self.model(batch["input_ids"]), batch["labels"]
        if self.returned == "logits":
            return {"loss": own_loss(logits, labels), "logits": logits}
        logits, labels = logits[:, :-1], labels[:, 1:]
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = losses.sum() / (labels != -100).sum()
        given = {"loss": loss, "token_losses": losses, "labels": labels}
        if self.returned != "losses":
            given["correct"] = logits.argmax(-1) == labels
        if self.returned == "no labels":
            del given["labels"]
        return loss if self.returned == "loss" else given


def bigram_metrics(records: list[dict[str, Any]]) -> dict[str, float]:
    rows = Bigrams().table.weight.detach().double().log_softmax(-1)
    sums: dict[str, list[float]] = {}
    for record in records:
        entry = sums.setdefault(record["channel"], [0.0, 0.0, 0.0])
        for before, label in zip(record["input_ids"], record["labels"][1:], strict=False):
            if label != -100:
                entry[0] -= rows[before, label].item()
                entry[1] += rows[before].argmax().item() == label
                entry[2] += 1
    total = sum(count for _, _, count in sums.values())
    return {
        f"{name}_{metric}": value
        for name, (nll, correct, count) in sums.items()
        for metric, value in (
            ("loss", nll / count),
            ("token_acc", correct / count),
            ("tokens", count),
            ("share", count / total),
        )
    }


@pytest.mark.parametrize("returned", ["logits", "by hand", "no labels"])
def test_a_network_of_its_own_returns_logits_or_token_losses(returned: str) -> None:
    (window,) = run(RECORDS, module=OwnNetwork(returned)).windows
    assert window.logs == pytest.approx(bigram_metrics(RECORDS), rel=1e-5)


def test_token_losses_of_a_packed_batch_are_at_their_labels() -> None:
    class Packed(OwnNetwork):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            given = super().training_step(batch, batch_idx)
            losses = torch.nn.functional.pad(given["token_losses"], (1, 0))
            return {"loss": given["loss"], "token_losses": losses, "labels": batch["labels"]}

    counts = MetricsConfig(metrics=("loss", "tokens", "share"))
    found = run(RECORDS, module=Packed("losses"), collate=flattened, config=counts)
    wanted = {k: v for k, v in bigram_metrics(RECORDS).items() if not k.endswith("_acc")}
    assert found.windows[0].logs == pytest.approx(wanted, rel=1e-5)


def test_a_step_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(UnsupportedVersionError, match="In Lightning, return"):
        run(RECORDS, module=OwnNetwork("loss"))


class Distils(Module):
    """A student that is trained towards a teacher."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__(still_model())
        self.teacher = tiny_model(7).eval().requires_grad_(not frozen)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            wanted = self.teacher(**batch).logits.log_softmax(-1)
        outputs = self.model(**batch)
        towards = kl_div(
            outputs.logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
        return outputs.loss + towards

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.training_step(batch, batch_idx)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_teacher_does_not_count(frozen: bool) -> None:
    callback = ChannelMetricsCallback(model=None if frozen else "model")
    found = run(RECORDS, held_out=[HELD_OUT], module=Distils(frozen=frozen), callback=callback)
    check(found.logs("train")[0], RECORDS)
    check(found.logs("val")[0], HELD_OUT, "val_")


def test_two_models_need_a_name() -> None:
    with pytest.raises(ConfigError, match=r"2 models \(model, teacher\)"):
        run(RECORDS, module=Distils(frozen=False))
    with pytest.raises(ConfigError, match="no module 'modle'; did you mean 'model'"):
        run(RECORDS, callback=ChannelMetricsCallback(model="modle"))


def test_two_forwards_that_cannot_be_told_apart_are_refused() -> None:
    class Twice(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss + self.model(**batch).loss

    with pytest.raises(UnsupportedVersionError, match="2 forwards in one step"):
        run(RECORDS, module=Twice())


class Manual(Module):
    """Optimizes by itself."""

    def __init__(self) -> None:
        super().__init__(tiny_model(), 1e-2)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.model(**batch).loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())


def test_manual_optimization() -> None:
    on, off = (run(RECORDS, module=Manual(), on=on) for on in (True, False))
    assert torch.equal(weights(on.module), weights(off.module))
    (window,) = on.windows
    # Both batches; the losses of the module are the means of each.
    supervised = [sum(i != -100 for r in RECORDS[s : s + 4] for i in r["labels"]) for s in (0, 4)]
    of_all = sum(n * loss for n, loss in zip(supervised, on.module.losses, strict=True))
    ours = sum(window.sums(name)["nll"] for name in window.names)
    assert ours == pytest.approx(of_all, rel=1e-6)
    assert window.step == 2


def test_a_step_that_lightning_skips_does_not_count() -> None:
    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    check(run(RECORDS, module=Skips()).windows[0].logs, RECORDS[:4])


def test_a_step_that_the_optimizer_repeats_counts_once() -> None:
    class Repeats(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.0, max_iter=2)

    found = run(RECORDS, module=Repeats())
    assert len(found.module.losses) > 2
    check(found.windows[0].logs, RECORDS)


def test_a_batch_without_channels_is_refused() -> None:
    callback: Any = ChannelMetricsCallback()
    callback.collator = lambda base: base
    with pytest.raises(ChannelError, match="give its data loader a collate_fn"):
        run(RECORDS, callback=callback)


def test_several_loaders_in_one_batch_are_refused() -> None:
    class Both(Module):
        def train_dataloader(self) -> Any:
            from lightning_tools import loader

            return {"a": loader(RECORDS), "b": loader(RECORDS)}

    with pytest.raises(ChannelError, match="must hold `channels`, but holds a, b;"):
        L.Trainer(
            callbacks=[ChannelMetricsCallback()],
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        ).fit(Both())


def test_an_error_of_the_module_is_raised() -> None:
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        run(RECORDS, module=Fails(), config=MetricsConfig(on_error="warn"))


def test_a_peft_model() -> None:
    wrapped = peft.get_peft_model(still_model(), peft.LoraConfig(target_modules=["q_proj"]))
    check(run(RECORDS, module=Module(wrapped)).windows[0].logs, RECORDS)


@pytest.mark.parametrize("compiled", ["the model", "the module"])
def test_compiled(compiled: str) -> None:
    """With the backend that only traces."""

    class Returns(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = self.model(**batch)
            return {"loss": outputs.loss, "logits": outputs.logits}

    torch._dynamo.reset()
    if compiled == "the model":
        module: Any = Module(torch.compile(still_model(), backend="eager"))
    else:
        module = torch.compile(Returns(), backend="eager")
    check(run(RECORDS, module=module).windows[0].logs, RECORDS)


def test_a_compiled_module_that_returns_its_loss_only_is_refused() -> None:
    torch._dynamo.reset()

    class Plain(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(**batch).loss

    with pytest.raises(ChannelMetricsError, match='"logits": logits'):
        run(RECORDS, module=torch.compile(Plain(), backend="eager"))
