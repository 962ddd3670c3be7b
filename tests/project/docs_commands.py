"""The commands in README and docs, and why a program's commands are not run as they stand."""

from __future__ import annotations

import keyword
import re
import shlex
from typing import NamedTuple

from test_docs_blocks import ALL, PAGES, ROOT, Block, first_line

from channel_metrics.cli.main import app

# {program: why its commands are not run as they stand}. Here each program reads them.
NOT_RUN = {
    ".ci/run": "it runs these tests, among others",
    "accelerate": "named without a script; tests/cli/test_children.py launches some with it",
    "axolotl": "needs an environment of its own; make test-axolotl, by hand",
    "channel-metrics": "names files of the reader; tests/cli, tests/analysis run all with theirs",
    "git": "needs the address of the repository",
    "kill": "ends a process of the reader",
    "llamafactory-cli": "needs an environment of its own; make test-llamafactory, by hand",
    "make": "CI runs some of its targets; BY_HAND_ONLY says why not the others",
    "megatron": "needs CUDA; tests/trainers/swift_megatron run its functions",
    "pip": "needs the network, and an environment of the reader",
    "python": "the tests below, and those in RUN_BY, run most of them; benchmarks take minutes",
    "swift": "needs a model; tests/trainers/swift/test_swift_command.py runs it with one",
    "torchrun": "needs a script; tests/cli/test_children.py and tests/megatron_lm run such ones",
}
# {target of make that .ci/run does not run: why}
BY_HAND_ONLY = {
    "bench": "measures; needs an idle machine",
    "check": "runs `lint`, and a part of `test`, and CI runs both whole",
    "matrix": "downloads older releases, and takes most of an hour",
    "test-axolotl": "needs an environment of its own",
    "test-llamafactory": "needs an environment of its own",
    "test-upstream": "needs a checkout of TRL or transformers, and takes hours",
}
# First words of `code` in the text that is no command: subcommands of ours, Python, parts of logs.
NO_PROGRAM = {
    *(str(command.name) for command in app.registered_commands),
    *keyword.kwlist,
    *("a", "domain", "float", "hidden", "int", "is_display", "iteration", "lm", "loss", "module"),
    *("probe.trainer", "sdpa", "step", "throughput/in-loop", "train/CE", "truncation_strategy"),
    "validation-web",
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
    ("README.md", "{'loss': '0.5509', 'bbu_loss': '0.04066', 'bbu_token_acc': '0.9928', "): "a log",
    ("docs/index.md", "{'loss': '0.5509', 'bbu_loss': '0.04066', "): "a log",
    ("docs/TRAINING_PLAYBOOK.md", "{'loss': '0.5509', 'bbu_loss': '0.04066', "): "a log",
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
# Read by tests of their own.
OTHER_LANGUAGES = ("python", "diff", "json", "yaml")


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


def commands_in_text(page: str) -> list[str]:
    """Each `code` in the text that begins like a command, or is a script of this repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    spans = [re.sub(r"^([A-Z_]+=\S+ )+", "", span) for span in spans]  # variables for the command
    words = r"[a-z.][\w./-]* .+"
    found = [one for one in spans if re.fullmatch(rf"{words}|\.ci/\w+|scripts/\w+", one)]
    return [one for one in found if one.split()[0] not in {*NO_PROGRAM, "..."}]


BLOCKS = [block for block in ALL if block.language not in OTHER_LANGUAGES]
BLOCKS += [block for page in PAGES for block in unfenced(page)]
IN_BLOCKS = [
    command(block.page, line)
    for block in BLOCKS
    if not is_other(block)
    for line in lines(block.text)
]
IN_TEXT = [command(page, span) for page in PAGES for span in commands_in_text(page)]
COMMANDS = IN_BLOCKS + IN_TEXT
