"""What harnesses share: how a script gets to the ranks, and what is kept of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fork_client import Preload
from rank_cases import RanksOf
from said import warnings_of_ours

from channel_metrics import ChannelMetrics
from channel_metrics.ranks.ranks import Ranks
from contract.script import Harness, Ran, Script, faulty_count

__all__ = ["Forking", "watch_windows"]


class Forking(Harness):
    """Runs scripts in forked ranks; with one rank and `is_here`, in this process."""

    preload = Preload(("hf_case_tools",))  # `hf_case_tools.HF`, which Megatron does not need
    is_here = True
    first = 1
    ranks_of: RanksOf
    """The tests give it."""

    def run(self, script: Script, folder: Path, ranks: int = 1) -> list[Ran]:
        if ranks == 1 and self.is_here:
            return [self.run_here(script, folder)]
        return self.ranks_of.call(
            self.preload,
            self.run_here,
            script,
            folder,
            ranks=ranks,
            folder=folder,
            imports=[type(self).__module__],
        )

    def run_here(self, script: Script, folder: Path) -> Ran:
        """The run of this process."""
        ran = Ran()
        with warnings_of_ours() as ran.warnings, faulty_count(script.fault_at):
            try:
                self.train(script, folder, ran)
            except Exception as error:  # whatever ends a run is part of the outcome
                ran.error = error
        return ran

    def train(self, script: Script, folder: Path, ran: Ran) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """What goes to the ranks, which fork none of their own."""
        return {name: value for name, value in vars(self).items() if name != "ranks_of"}


def watch_windows(metrics: ChannelMetrics, ran: Ran) -> None:
    """Keep the windows of a session, and how many all-reduces of ours came before each."""
    calls = [0]
    all_reduce = Ranks.all_reduce

    class Counted(Ranks):
        def all_reduce(self, values: Any) -> Any:
            calls[0] += 1
            return all_reduce(self, values)

    ranks = metrics.ranks
    metrics.ranks = Counted(ranks.group, ranks.device, ranks.alone)

    def keep(window: Any) -> None:
        ran.windows.append(window)
        ran.collectives.append(calls[0])
        calls[0] = 0

    metrics.on_window.append(keep)
