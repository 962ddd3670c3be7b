"""Every command in README and docs is run by a test, or read by its program, with the reason.

Commands of `channel-metrics` are in test_docs_blocks.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from fork_client import Preload
from megatron_lm.launch import needs_megatron_training
from rank_cases import Case, RanksOf, case
from swift_tools import SWIFT, needs_swift
from test_docs_blocks import ALL, PAGES, ROOT, Block, commands, first_line

# {program: why its commands are not run as they stand}. Here each program reads them.
NOT_RUN = {
    "channel-metrics": "names files of the reader; tests/cli run every command",
    "git": "needs the address of the repository",
    "llamafactory-cli": "needs an environment of its own; make test-llamafactory runs it",
    "make": ".ci/run runs what needs no checkout of another project",
    "megatron": "needs CUDA; tests/trainers/swift_megatron run its functions",
    "pip": "needs the network; .ci/run installs the same extras",
    "python": "the tests below, and those in RUN_BY, run most of them; benchmarks take minutes",
    "swift": "needs a model; tests/trainers/swift/test_swift_command.py runs it with one",
    "torchrun": "needs a script; tests/cli/test_children.py and tests/megatron_lm run such ones",
}
# {script: the test that runs it}
RUN_BY = {
    "configs/one_mixture/prepare.py": "tests/project/test_one_mixture.py",
    "configs/vision_mixture/generate.py": "tests/trainers/swift/test_swift_vision.py",
    "docs/generate.py": "tests/project/test_generated_docs.py",
}
BY_HAND = {"docs/playbook.py": "it trains for minutes, and writes the pictures of the playbook"}
# {(page, first line of a block): what it is, if not commands}
OTHER = {
    ("README.md", "{'loss': '0.5512', 'bbu_loss': '0.04067', 'bbu_token_acc': '0.9926', "): "a log",
    ("docs/index.md", "{'loss': '0.5512', 'bbu_loss': '0.04067', "): "a log",
    ("docs/TRAINING_PLAYBOOK.md", "{'loss': '0.5512', 'bbu_loss': '0.04067', "): "a log",
    ("docs/TRAINING_PLAYBOOK.md", "alert at step 70: lvis: starved"): "a warning of the run",
    ("docs/TRAINING_PLAYBOOK.md", "! lvis: alert at step 70: starved"): "what a command prints",
    ("docs/porting.md", "trainer.py, line 301"): "an error",
    ("docs/porting.md", "NotImplementedError: FlexAttention"): "an error",
    ("docs/megatron_bridge.md", " iteration        2 channels | web_loss: "): "a log",
    ("docs/megatron.md", " iteration        2 channels | web_loss: "): "a log",
    ("docs/lightning.md", "metrics = ChannelMetricsCallback()"): "a part of its example",
    ("docs/analysis.md", '{"step": 10, "id": "a-17"'): "a line of a file",
    ("docs/report.md", "! lang_chat in eval: worse since step 60"): "what a command prints",
    ("docs/scale.md", "72 bytes x (channels + 1) + 280 bytes"): "a formula",
}
READ_BY = {
    "python": "test_docs_blocks.py",
    "diff": "test_contributing.py",
    "json": "test_the_record_of_the_playbook",
    "yaml": "test_generated_docs.py, test_the_settings_of_a_probe, tests/trainers/axolotl",
}


class Command(NamedTuple):
    """A command line in a page."""

    page: str
    program: str
    arguments: list[str]


def unfenced(page: str) -> list[Block]:
    """The indented blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\n\n((?: {4}\S.*\n)+)(?=\n)", text)
    blocks = (re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found)
    return [Block(page, 0, "text", block) for block in blocks if not block.startswith("- ")]


def is_other(block: Block) -> bool:
    return any(page == block.page and first_line(block).startswith(start) for page, start in OTHER)


def lines(text: str) -> list[str]:
    text = re.sub(r"\s#.*", "", text.replace("\\\n", " "))
    return [line.strip() for line in text.splitlines() if line.strip()]


def command(page: str, line: str) -> Command:
    program, *arguments = shlex.split(re.sub(r"\$\(which (\S+)\)", r"\1", line))
    return Command(page, program, [item for item in arguments if item != "..."])


BLOCKS = [block for block in ALL if block.language not in READ_BY]
BLOCKS += [block for page in PAGES for block in unfenced(page)]
IN_BLOCKS = [
    command(block.page, line)
    for block in BLOCKS
    if not is_other(block)
    for line in lines(block.text)
]
IN_TEXT = [
    command(page, span)
    for page in PAGES
    for span in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text(encoding="utf-8"))
    if re.match(f"({'|'.join(NOT_RUN)}) [^`]", span)
]
COMMANDS = IN_BLOCKS + IN_TEXT


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


@of("llamafactory-cli")
def test_llamafactory(given: Command) -> None:
    assert given.arguments == ["train", "config.yaml"]


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


@case(Preload(("swift_megatron_cpu:install",)), ranks=1)
def megatron_of_swift(folder: Path) -> list[str]:
    from swift.megatron.arguments import MegatronSftArguments

    return unknown_to_swift("megatron", {"sft": MegatronSftArguments})


@needs_swift
@pytest.mark.parametrize("reads", [swift, megatron_of_swift])
def test_swift(ranks_of: RanksOf, reads: Case) -> None:
    assert ranks_of(reads) == [[]]


@case(Preload(("megatron_lm.cpu:install",)), ranks=1)
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


def test_the_settings_of_a_probe() -> None:
    from channel_metrics.probes.probe import ProbeConfig

    (block,) = [b for b in ALL if b.page == "docs/probe.md" and b.language == "yaml"]
    section = yaml.safe_load(block.text)["probe"]
    assert section.pop("sources") == {"canary": "canary.jsonl"}
    assert ProbeConfig(**section).every == 20


def test_the_record_of_the_playbook() -> None:
    import json

    from channel_metrics import MetricsConfig
    from channel_metrics.core.labels import channel_of

    (block,) = [b for b in ALL if b.page == "docs/TRAINING_PLAYBOOK.md" and b.language == "json"]
    assert channel_of(json.loads(block.text), MetricsConfig().fields) == "bbu"
