"""The playbook's mixture in Megatron's own loop, with the options that the playbook shows."""

from __future__ import annotations

import re
from contextlib import chdir
from pathlib import Path

from mixture_tools import FOLDER, check_counts, prepare
from paths import ROOT

from megatron_lm.launch import Launcher, needs_megatron_training

# What the playbook leaves to the user: a model and a schedule. One epoch of 32 records.
LENGTH = [
    "--seq-length",
    "512",
    "--max-position-embeddings",
    "512",
    "--make-vocab-size-divisible-by",
    "66",
]
EPOCH = ["--global-batch-size", "8", "--train-iters", "4"]


def shown_options() -> list[str]:
    """The options of the command in the playbook."""
    page = (ROOT / "docs/TRAINING_PLAYBOOK.md").read_text(encoding="utf-8")
    found = re.search(r"pretrain_gpt\.py MODEL-AND-SCHEDULE (--sft .*?)\n```", page, re.DOTALL)
    assert found is not None
    return found[1].replace("\\\n", " ").split()


@needs_megatron_training
def test_megatron(launcher: Launcher, tmp_path: Path) -> None:
    with chdir(tmp_path):
        prepare().main(vision=False)
    options = [str(tmp_path / o) if o.startswith(FOLDER) else o for o in shown_options()]
    run = launcher.run("dp1", *LENGTH, *EPOCH, *options, patch=True)
    steps = sorted({step for key in run.scalars for step in run.scalars[key]})
    logs = [
        {key: values[step] for key, values in run.scalars.items() if step in values}
        for step in steps
    ]
    # The default prompt format trains on whole conversations, without the first token.
    check_counts(logs, more_tokens=20, whole=True)
