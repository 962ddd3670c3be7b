"""The runs and pictures of the training playbook: `python docs/playbook.py [NAME ...]`.

Each case trains the tiny model of the demo on the sources of configs/fused_data, with one change.
It writes docs/playbook_NAME.svg, and the log into tests/analysis/logs, from which a test reads the
values that the page quotes. All cases together take about ten minutes on two CPU cores.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
import yaml

from channel_metrics import swap
from channel_metrics.alerting import ALERTS_FILE
from channel_metrics.analysis.run import RUN_FILE
from channel_metrics.demo import train as demo
from channel_metrics.demo.config import TrainConfig, load_config
from channel_metrics.demo.mixture import Mixture

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "channel_metrics"

DOCS = Path(__file__).resolve().parent
DATA = DOCS.parent / "configs" / "fused_data"
LOGS = DOCS.parent / "tests" / "analysis" / "logs"
COLORS = {"bbu": "#2a78d6", "rru": "#1baf7a", "lvis": "#eda100", "lang_chat": "#e34948"}

Logs = list[dict[str, Any]]


class Case:
    """One run: the settings of the demo, which a case changes, and a folder for its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = yaml.safe_load((DATA / "debug.yaml").read_text())
        for source in self.settings["sources"].values():
            source["path"] = str(DATA / source["path"])
            source["val_path"] = str(DATA / source["val_path"])
        self.settings["metrics"] = {"metrics": ["loss", "token_acc", "tokens", "samples", "share"]}
        self.training = self.settings["training"]
        self.training |= {"max_steps": 120, "eval_steps": 20, "logging_steps": 5}

    def records(self, source: str) -> list[dict[str, Any]]:
        """The training records of a source."""
        lines = Path(self.settings["sources"][source]["path"]).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def replace(self, source: str, records: Sequence[dict[str, Any]]) -> None:
        """Train on these records instead of those of `source`."""
        path = self.folder / f"{source}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.settings["sources"][source]["path"] = str(path)

    def run(self, name: str = "run") -> Logs:
        """Train, and return what the trainer logged."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.settings))
        return demo.train(load_config(path), output_dir=self.folder / name).log_history


def series(logs: Logs, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key."""
    found = [(entry["step"], float(entry[key])) for entry in logs if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def picture(name: str, panels: Sequence[tuple[str, Logs, Sequence[tuple[str, str, str]]]]) -> None:
    """Draw panels side by side: (title, logs, [(key, channel or "", line style)])."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for axis, (title, logs, lines) in zip(axes[0], panels, strict=True):
        for key, channel, style in lines:
            color = COLORS.get(channel, "black")
            axis.plot(*series(logs, key), style, color=color, label=key, lw=1.6, ms=3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / f"playbook_{name}.svg", metadata={"Date": None})
    plt.close(figure)


def keep(name: str, logs: Logs, *others: str) -> None:
    """Write the losses and tokens of a run, and `others`, as the log of this case."""
    kept = re.compile("|".join((r"\w*loss", r"(?!eval)\w+_tokens", *others)))
    lines = [
        {key: round(value, 4) for key, value in entry.items() if kept.fullmatch(key)}
        | {"step": entry["step"]}
        for entry in logs
        if "train_loss" not in entry
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (LOGS / f"playbook_{name}.jsonl").write_text(text)


def channels(form: str, style: str = "-") -> list[tuple[str, str, str]]:
    """One line per channel, for keys of this form."""
    return [(form.format(name), name, style) for name in COLORS]


def healthy(case: Case) -> None:
    """Nothing is changed."""
    logs = case.run()
    whole = ("loss", "", "--")
    picture(
        "healthy",
        [
            ("training", logs, [whole, *channels("{}_loss")]),
            ("evaluation", logs, channels("eval_{}_loss", ".-")),
        ],
    )
    keep("healthy", logs, "lang_chat_samples")


def forgetting(case: Case) -> None:
    """After 60 steps on all sources, 120 steps on bbu, with two records of each other source."""
    logs = _two_runs(case)
    picture(
        "forgetting",
        [
            ("loss of the whole run", logs, [("loss", "", "--")]),
            ("evaluation", logs, channels("eval_{}_loss", ".-")),
        ],
    )
    keep("forgetting", logs)


def _two_runs(case: Case, steps: int = 120) -> Logs:
    """60 steps on all sources; then `steps` on bbu, with two records of each other source."""
    case.training |= {"max_steps": 60, "save_strategy": "steps", "save_steps": 60}
    first = case.run("first")
    model = sorted((case.folder / "first").glob("checkpoint-*"))[-1]
    case.settings["model"] = str(model)
    case.training |= {"max_steps": steps, "save_strategy": "no", "learning_rate": 1e-3}
    for name, source in case.settings["sources"].items():
        source["ratio"] = 1 if name == "bbu" else 0.003
    second = case.run("second")
    return first + [entry | {"step": entry["step"] + 60} for entry in second]


def imbalance(case: Case) -> None:
    """lang_chat gets one record of a hundred."""
    case.settings["sources"]["lang_chat"]["ratio"] = 0.008
    logs = case.run()
    picture(
        "imbalance",
        [
            ("share of the tokens", logs, channels("{}_share")),
            ("evaluation", logs, channels("eval_{}_loss", ".-")),
        ],
    )
    keep("imbalance", logs)


def broken(case: Case) -> None:
    """The answers of rru are those of other questions, with their characters shuffled."""
    rng = random.Random(0)
    records = case.records("rru")
    for record in records:
        answer = list(record["messages"][-1]["content"])
        rng.shuffle(answer)
        record["messages"][-1]["content"] = "".join(answer)
    case.replace("rru", records)
    logs = case.run()
    picture(
        "broken",
        [
            ("training", logs, [("loss", "", "--"), *channels("{}_loss")]),
            ("evaluation (intact data)", logs, channels("eval_{}_loss", ".-")),
        ],
    )
    keep("broken", logs, "rru_token_acc")


def starved(case: Case) -> None:
    """The mix is read once, in order. lvis is a fifth of it, but its records end after 64."""
    case.settings["num_samples"] = 1400
    case.settings["metrics"] |= {
        "stream": str(case.folder / "run" / "windows.jsonl"),
        "alerts": {"to": ["logger"]},
    }
    case.training["train_sampling_strategy"] = "sequential"
    with swap.wrapped(demo, "build_mixture", _lvis_ends):
        logs = case.run()
    evaluated = channels("eval_{}_loss", ".-")
    picture(
        "starved",
        [
            ("share of the tokens", logs, channels("{}_share", ".-")),
            ("the loss of the run, and evaluation", logs, [("loss", "", "--"), *evaluated]),
        ],
    )
    keep("starved/log", logs, r"(?!eval)\w+_samples")
    for file in (ALERTS_FILE, RUN_FILE):
        shutil.copy(case.folder / "run" / file, LOGS / "playbook_starved")


def _lvis_ends(
    build: Callable[[TrainConfig, Any], Mixture], config: TrainConfig, tokenizer: Any
) -> Mixture:
    """The mixture without the records of lvis after its first 64."""
    mixture = build(config, tokenizer)
    sources = [metadata["_fusion_source"] for metadata in mixture.train["metadata"]]
    late = {index for index, source in enumerate(sources) if source == "lvis"}
    late -= set(sorted(late)[:64])
    rows = [index for index in range(len(sources)) if index not in late]
    return replace(mixture, train=mixture.train.select(rows))


def template(case: Case) -> None:
    """lang_chat is given as text, so its questions are learned, too: nothing is masked."""
    records = [
        {"text": "\n".join(message["content"] for message in record["messages"])}
        for record in case.records("lang_chat")
    ]
    case.replace("lang_chat", records)
    logs = case.run("unmasked")
    intact = Case(case.folder / "intact")
    intact.folder.mkdir()
    before = intact.run("masked")
    shares = channels("{}_share")
    picture("template", [("as it should be", before, shares), ("nothing masked", logs, shares)])
    keep("template", logs, "lang_chat_samples")


def overfitting(case: Case) -> None:
    """The target bbu has 12 records, which are seen again and again."""
    case.replace("bbu", case.records("bbu")[:12])
    case.settings["sources"]["bbu"]["ratio"] = 2
    case.settings["num_samples"] = 400
    case.training |= {"max_steps": 200}
    logs = case.run()
    both = [("bbu_loss", "bbu", "-"), ("eval_bbu_loss", "bbu", ".--")]
    picture(
        "overfitting",
        [
            ("loss of the whole run", logs, [("loss", "", "-"), ("eval_loss", "", ".--")]),
            ("the target", logs, both),
        ],
    )
    keep("overfitting", logs)


def drift(case: Case) -> None:
    """As forgetting, but bbu has only 12 records, and they are seen for 400 steps."""
    case.replace("bbu", case.records("bbu")[:12])
    logs = _two_runs(case, steps=400)
    target = [("bbu_loss", "bbu", "-"), ("eval_bbu_loss", "bbu", ".--")]
    sources = [line for line in channels("eval_{}_loss", ".-") if line[1] != "bbu"]
    picture("drift", [("the target", logs, target), ("the sources", logs, sources)])
    keep("drift", logs)


CASES: dict[str, Callable[[Case], None]] = {
    case.__name__: case
    for case in (healthy, forgetting, imbalance, broken, starved, template, overfitting, drift)
}


def main(names: Sequence[str]) -> None:
    """Run these cases, or all."""
    torch.set_num_threads(1)  # the same numbers on every machine
    for name in names or CASES:
        print(f"{name}: {CASES[name].__doc__}")
        with TemporaryDirectory() as folder:
            CASES[name](Case(Path(folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
