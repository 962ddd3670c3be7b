"""The runs of ms-swift's Megatron trainer that the tests look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
METRICS = ("loss", "token_acc", "ppl", "tokens", "samples", "share", "tokens_total")
ON = {"metrics": METRICS}
WITHOUT_ACCURACY = {"metrics": ("loss", "tokens", "share")}
PADDED, PACKED = {"padding_free": False}, {"padding_free": True}
# A packing process that is spawned imports everything again.
PACKING = {"packing": True, "dataloader_multiprocessing_context": "fork"}
NO_FLAG = {"enable_channel_loss": False}
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
    """One run. metrics: the config of the plugin, None for ms-swift alone.

    given: arguments; "FILES[x]" stands for one of the files of the runs. script: in place of a
    training run. observe: further observers.
    """

    name: str
    layout: str
    given: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None
    data: str = "plain"
    script: str = "swift_megatron_run.py"
    observe: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return 1 if self.layout == "dp1" else 2

    def observers(self, usual: list[str]) -> list[str]:
        return [*usual, *self.observe] if self.script == Case.script else []

    def arguments(self, files: dict[str, Path]) -> dict[str, Any]:
        of_files = {"model": str(files["model"]), "dataset": [str(files[self.data])]}
        given = {
            key: str(files[value[6:-1]]) if str(value).startswith("FILES[") else value
            for key, value in self.given.items()
        }
        return BASE | of_files | LAYOUTS[self.layout] | given


def on_and_off(name: str, layout: str, *given: dict[str, Any], **rest: Any) -> list[Case]:
    both = {key: value for part in given for key, value in part.items()}
    metrics = rest.pop("metrics", ON)
    off = Case(f"{name}_off", layout, both, **(rest | {"observe": ()}))
    return [off, Case(f"{name}_on", layout, both, metrics=metrics, **rest)]


EVALUATION = {
    "val_dataset": "FILES[plain]",
    "eval_steps": 2,
    "eval_iters": 2,
    "train_iters": 4,
    "logging_steps": 2,
    "metric_for_best_model": "bbu_loss",
}
# The first iteration is always logged; the checkpoint comes in the middle of the next window.
RESUMABLE = {
    "train_iters": 4,
    "logging_steps": 4,
    "save_steps": 2,
    "save_strategy": "steps",
    "save_safetensors": False,
}
RESUMED = RESUMABLE | {
    "mcore_model": "FILES[checkpoint]",
    "finetune": False,
    "no_load_optim": True,
    "save_safetensors": True,
}

RUNS = [
    *on_and_off("padded_dp1", "dp1", PADDED),
    *on_and_off("packed_dp1", "dp1", PACKED),
    *on_and_off("padded_dp2", "dp2", PADDED),
    *on_and_off("packed_tp2", "tp2", PACKED),
    *on_and_off("packed_pp2", "pp2", PACKED),
    *on_and_off("packed_vpp2", "vpp2", PACKED),
    *on_and_off("packed_cp2", "cp2", PACKED),
    *on_and_off("padded_cp2", "cp2", PADDED),
    *on_and_off("packed_cp2_contiguous", "cp2_contiguous", PACKED),
    *on_and_off("no_flag_tp2", "tp2", PACKED, NO_FLAG, metrics=WITHOUT_ACCURACY),
    *on_and_off("weighted", "dp1", PADDED, {"loss_scale": "react"}, data="react"),
    *on_and_off("dft", "cp2", PACKED, {"enable_dft_loss": True}),
    *on_and_off("evaluation", "dp2", PADDED, EVALUATION),
    Case("packing", "dp1", PACKED | PACKING, ON),
    Case("stream", "dp2", PADDED | {"streaming": True}, ON, data="fused"),
    Case("resumable", "dp2", PACKED | RESUMABLE, ON),
    Case("resumed", "pp2", PACKED | RESUMED, ON),
    *on_and_off(
        "fault",
        "dp2",
        PADDED,
        metrics=ON | {"on_error": "warn"},
        observe=("swift_megatron_observe:fault",),
    ),
    Case("one_pack", "cp2", script="swift_megatron_one_pack.py"),
]
