"""Runs of ms-swift's Megatron trainer, each when a test first asks for it, by one server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fork_client import Preload
from megatron_lm.launch import Launcher, Run
from paths import PATCHES
from swift_files import make_data, make_model

FOLDER = Path(__file__).parent
RUN_SECONDS = 60
# With what a run imports on its way.
SWIFT_MEGATRON = Preload(
    (
        "swift_megatron_cpu:install",
        "swift.megatron.pipelines",
        "swift.megatron.arguments",
        "swift.megatron.trainers",
        "swift.pipelines",
        "swift.trainers",
        "megatron.core.dist_checkpointing",
        "megatron.core.transformer.experimental_attention_variant.dsa",
        "matplotlib.pyplot",
        "tensorboard.backend.event_processing.event_accumulator",
        "torch.utils.tensorboard",
        "transformers.models.qwen2",
        "channel_metrics.trainers.swift_megatron",
    )
)
OBSERVERS = ("collectives", "logs", "end", "tokens", "used")
BASE = {
    "model_type": "qwen2",
    "template": "qwen2_5",
    "tuner_type": "full",
    "torch_dtype": "bfloat16",
    # Of the backends, ms-swift lets this one do packs; the layers here are the CPU's in any case.
    "attention_backend": "flash",
    "recompute_granularity": "none",
    "use_hf": True,
    "check_model": False,
    "finetune": True,
    "add_version": False,
    "report_to": [],
    "split_dataset_ratio": 0,
    "dataloader_num_workers": 0,
    "dataset_num_proc": 1,
    "max_length": 256,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 3,
    "logging_steps": 1,
    "lr": 1e-2,
    "lr_decay_style": "constant",
    "save_strategy": "no",
    "save_steps": 1000,
    "no_save_optim": True,
    "save_safetensors": True,
    "enable_channel_loss": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp1": {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "cp2_contiguous": {"context_parallel_size": 2, "cp_partition_mode": "contiguous"},
}


@dataclass(frozen=True)
class Case:
    """One run.

    given: arguments; "FILES[x]" stands for one of the files of the runs. metrics: the config of the
    plugin, None for ms-swift alone. script: in place of a training run. observe: further observers
    of `swift_megatron_observe`. resumes: a run that comes first; "FILES[checkpoint]" is what it has
    saved at its second step.
    """

    name: str
    layout: str
    given: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None
    data: str = "plain"
    script: str = "swift_megatron_run.py"
    observe: tuple[str, ...] = ()
    resumes: Case | None = None

    @property
    def ranks(self) -> int:
        return 1 if self.layout == "dp1" else 2

    def observers(self) -> list[str]:
        wanted = (*OBSERVERS, *self.observe) if self.script == Case.script else ()
        return [f"swift_megatron_observe:{name}" for name in wanted]

    def arguments(self, files: dict[str, Path]) -> dict[str, Any]:
        of_files = {"model": str(files["model"]), "dataset": [str(files[self.data])]}
        given = {
            key: str(files[value[6:-1]]) if str(value).startswith("FILES[") else value
            for key, value in self.given.items()
        }
        return BASE | of_files | LAYOUTS[self.layout] | given


@dataclass(frozen=True)
class Pair:
    """The same run of ms-swift alone, and with metrics; it can be unpacked."""

    off: Case
    on: Case

    @property
    def __name__(self) -> str:
        """pytest shows it as the name of a parameter."""
        return self.on.name.removesuffix("_on")

    def __iter__(self) -> Iterator[Case]:
        return iter((self.off, self.on))


METRICS = ("loss", "token_acc", "ppl", "tokens", "samples", "share", "tokens_total")
ON = {"metrics": METRICS}
PADDED, PACKED = {"padding_free": False}, {"padding_free": True}


def pair(name: str, layout: str, *given: dict[str, Any], **rest: Any) -> Pair:
    """A case without and with metrics; only the latter has the observers that `rest` asks for."""
    both = {key: value for part in given for key, value in part.items()}
    metrics = rest.pop("metrics", ON)
    off = Case(f"{name}_off", layout, both, **(rest | {"observe": ()}))
    return Pair(off, Case(f"{name}_on", layout, both, metrics=metrics, **rest))


class Runs(Launcher):
    """The launcher of `megatron_lm`, for cases of ms-swift."""

    preload = SWIFT_MEGATRON

    def ranks(self, case: Case) -> list[dict[str, Any]]:
        """{observer: what it saw} per rank; a rank that failed is raised here."""
        return [rank.seen for rank in self._found(case).ranks]

    def logs(self, case: Case) -> list[dict[str, Any]]:
        """What was logged, by the rank that writes."""
        logs: list[dict[str, Any]] = self.ranks(case)[-1]["logs"]
        return logs

    def printed(self, case: Case, stream: str = "out") -> list[str]:
        """What each rank wrote to standard output, or (`err`) to standard error."""
        return [getattr(rank, stream) for rank in self._found(case).ranks]

    def repeat_until_equal(self, pair: Pair) -> None:
        """Run both again, at most twice, if they end in other weights.

        Megatron's virtual pipeline is not the same each time over gloo: of 24 runs without metrics
        on a busy machine one ended in other weights. Metrics that changed the training would do so
        always.
        """
        for attempt in range(2):
            off, on = ([rank.get("end") for rank in self.ranks(case)] for case in pair)
            if off == on:
                return
            for case in pair:
                again = replace(case, name=f"{case.name}_again{attempt}")
                self.done[case.name] = self._train(again)

    def _found(self, case: Case) -> Run:
        if case.name not in self.done:
            self.done[case.name] = self._train(case)
        run = self.done[case.name]
        if run.failure:
            raise AssertionError(run.failure)
        return run

    def _train(self, case: Case) -> Run:
        files = self.files
        if case.resumes is not None:
            checkpoint = self._found(case.resumes).folder / "out" / "checkpoint-2"
            files = {**files, "checkpoint": checkpoint}
        given = case.arguments(files) | {"output_dir": str(self.next_folder / "out")}
        environ = {}
        if case.metrics is not None:
            given["external_plugins"] = [str(PATCHES / "ms_swift.py")]
            path = self.folder / f"{case.name}.yaml"
            path.write_text(json.dumps(case.metrics))  # JSON is YAML
            environ["CHANNEL_METRICS_CONFIG"] = str(path)
        return self._run(
            {
                "ranks": case.ranks,
                "script": str(FOLDER / case.script),
                "args": [json.dumps(given)],
                "channel_metrics": None,
                "observe": case.observers(),
                "environ": environ,
                "timeout": RUN_SECONDS,
            }
        )

    @cached_property
    def files(self) -> dict[str, Path]:
        """The model and the data of all runs."""
        sizes: dict[str, Any] = {
            "num_hidden_layers": 4,
            "vocab_size": 512,
            "attention_dropout": 0.0,
        }
        model = make_model(self.folder / "model", **sizes)
        return {"model": model, "folder": self.folder, **make_data(self.folder)}
