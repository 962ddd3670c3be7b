"""Every command in README and docs is run by a test, or read by its program, with the reason.

Commands of `channel-metrics` are in test_docs_blocks.py.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from docs_commands import (
    BLOCKS,
    BY_HAND,
    BY_HAND_ONLY,
    COMMANDS,
    NO_PROGRAM,
    NOT_RUN,
    OTHER,
    RUN_BY,
    Command,
    commands_in_text,
)
from megatron_lm.launch import Launcher, needs_megatron_training
from rank_cases import Case, RanksOf, case
from swift_megatron_launch import SWIFT_MEGATRON
from swift_tools import SWIFT, needs_swift
from test_docs_blocks import PAGES, ROOT, commands

from channel_metrics.cli.main import app


def of(*programs: str) -> pytest.MarkDecorator:
    """The commands of programs, as a parameter of a test."""
    found = [c for c in COMMANDS if c.program in programs]
    names = [" ".join([c.page, c.program, *c.arguments])[:70] for c in found]
    return pytest.mark.parametrize("given", found, ids=names)


def test_every_block_is_known() -> None:
    """Also: no name in the lists above is left over, and the tests that they name exist."""
    assert {c.program for c in COMMANDS} == set(NOT_RUN)
    used = {(b.page, s) for b in BLOCKS for p, s in OTHER if p == b.page and b.text.startswith(s)}
    assert used == set(OTHER)
    for reason in NOT_RUN.values():
        assert all((ROOT / name).exists() for name in re.findall(r"tests/[\w/.]+\w", reason))
    for script, test in RUN_BY.items():
        assert script.rpartition("/")[2] in (ROOT / test).read_text(encoding="utf-8")


@of("make")
def test_make(given: Command) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    call = ["make", "--dry-run", *given.arguments]
    subprocess.run(call, cwd=ROOT, env=environ, check=True, capture_output=True)


def test_the_targets_that_ci_runs() -> None:
    scripts = [(ROOT / ".ci" / name).read_text() for name in ("run", "readme_commands")]
    runs = re.findall(r"^(?:step|begin) make ([\w-]+)", scripts[0], re.MULTILINE)
    runs += re.findall(r"make ([\w-]+)", scripts[1].split('== "')[1].split('"')[0])
    named = {given.arguments[0] for given in COMMANDS if given.program == "make"}
    assert named - set(runs) == set(BY_HAND_ONLY)


def test_a_command_in_the_text_is_found() -> None:
    assert "axolotl train config.yaml" in commands_in_text("docs/axolotl.md")
    assert ".ci/run" in commands_in_text("CONTRIBUTING.md")
    assert any(c.startswith("make test-latest ") for c in commands_in_text("docs/megatron.md"))
    # No word is left over in the list of those that are no programs.
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    ours = NO_PROGRAM - set(keyword.kwlist) - {c.name for c in app.registered_commands}
    assert [word for word in ours if not re.search(rf"`\s*{word}\s", text)] == []


@of("pip")
def test_pip(given: Command) -> None:
    install, *packages = given.arguments
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in packages:
        (extras,) = re.findall(r"(?:^\.|channel_metrics)\[(.+)\]$", package)
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    assert install == "install" and packages


@of("python")
def test_python(given: Command) -> None:
    first, *rest = given.arguments
    if first == "-c":
        subprocess.run([sys.executable, *given.arguments], cwd=ROOT, check=True)
    elif first == "-m":
        assert importlib.util.find_spec(rest[0]) is not None
        if rest[0].startswith("benchmarks."):
            assert set(rest[1:]) <= {"FOLDER"}  # what they take
            return
        from benchmarks.__main__ import PARTS

        assert set(rest[1:]) <= {*PARTS, "report"}
    elif first.endswith(".py"):
        assert (ROOT / first).exists() and first in {*RUN_BY, *BY_HAND}
    else:
        assert given.arguments == ["-I"]


@of("torchrun")
def test_torchrun(given: Command) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(given.arguments)
    if parsed.training_script == "train.py":
        return  # "before", on the page of Megatron-Bridge
    ours = given.arguments.index("-m")
    assert parsed.module and parsed.training_script == "channel_metrics"
    assert given.arguments[ours + 1 : ours + 3] == ["channel_metrics", "run"]


@of("llamafactory-cli", "axolotl")
def test_clis_of_other_environments(given: Command) -> None:
    not_run = [["train"], ["preprocess"], ["evaluate"]]  # named in the text of docs/axolotl.md
    assert given.arguments == ["train", "config.yaml"] or given.arguments in not_run


def below(program: str) -> list[list[str]]:
    """The arguments of a program, and of the same program below `channel-metrics run`."""
    found = [c.arguments for c in COMMANDS if c.program == program]
    for page in PAGES:
        for line in commands(page):
            words = [word for word in shlex.split(line) if word != "..."]
            found += [
                words[i + 1 :]
                for i, word in enumerate(words)
                if word == program and words[i - 1] != "--patch"
            ]
    return found


def unknown_to_swift(program: str, classes: dict[str, Any]) -> list[str]:
    """What ms-swift's parsers do not know in the commands of a program."""
    from swift.cli.main import parse_yaml_args
    from swift.utils.utils import HfArgumentParser, _patch_get_type_hints

    given = [rest for rest in below(program) if len(rest) > 1]
    assert given
    unknown = []
    for method, *rest in given:
        with chdir(ROOT):
            parse_yaml_args(rest)
        with _patch_get_type_hints():
            parser = HfArgumentParser([classes[method]])
        unknown += parser.parse_known_args(rest)[1]
    return unknown


@case(SWIFT, ranks=1)
def swift(folder: Path) -> list[str]:
    from swift.arguments import PretrainArguments, RLHFArguments, SftArguments

    classes = {"sft": SftArguments, "pt": PretrainArguments, "rlhf": RLHFArguments}
    return unknown_to_swift("swift", classes)


@case(SWIFT_MEGATRON, ranks=1)
def megatron_of_swift(folder: Path) -> list[str]:
    from swift.megatron.arguments import MegatronSftArguments

    return unknown_to_swift("megatron", {"sft": MegatronSftArguments})


@needs_swift
@pytest.mark.parametrize("reads", [swift, megatron_of_swift])
def test_swift(ranks_of: RanksOf, reads: Case) -> None:
    assert ranks_of(reads) == [[]]


@case(Launcher.preload, ranks=1)
def megatron(folder: Path) -> list[str]:
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from channel_metrics.trainers.megatron.arguments import add_arguments

    given = [rest for rest in below("pretrain_gpt.py") if rest]
    assert len(given) >= 3
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(add_megatron_arguments(parser))
    unknown = {word for rest in given for word in parser.parse_known_args(rest)[1]}
    return sorted(unknown - {"MODEL-AND-SCHEDULE"})


@needs_megatron_training
def test_megatron(ranks_of: RanksOf) -> None:
    assert ranks_of(megatron) == [[]]
