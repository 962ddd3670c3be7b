"""The sets of versions that `make matrix` installs, and the tests that it runs with each."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HF", "LOOPS", "PACKAGES", "PREFERENCE", "ROWS", "TRL", "Row"]

# What a row is about, beside Python and torch.
PACKAGES = ("transformers", "accelerate", "trl", "peft", "lightning", "datasets")

# A row takes one to three minutes, so these are chosen: exact numbers in each layout, bit-identical
# training, streams, two ranks, the patches.
HF = (
    "tests/data/test_collator.py",
    "tests/trainers/hf/test_hf.py",
    "tests/trainers/hf/test_hf_feeding.py",
)
TRL = (
    "tests/trainers/trl/test_trl_old.py",
    "tests/trainers/trl/test_trl_packing.py",
    "tests/trainers/trl/test_trl_reward.py",
    "tests/trainers/trl/test_trl_sft.py",
)
# From trl 0.29 on; with older ones these are refused, see test_trl_old. KTO is also run with peft.
PREFERENCE = (
    "tests/trainers/trl/test_trl_dpo.py",
    "tests/trainers/trl/test_trl_grpo.py",
    "tests/trainers/trl/test_trl_kto.py",
)
# Loops of one's own (accelerate among them), and Lightning.
LOOPS = (
    "tests/trainers/loop/test_loop.py",
    "tests/trainers/loop/test_loop_accelerate.py",
    "tests/trainers/loop/test_loop_packs.py",
    "tests/trainers/loop/test_loop_ranks.py",
    "tests/trainers/loop/test_loop_streams.py",
    "tests/trainers/lightning",
)


@dataclass(frozen=True)
class Row:
    """One set of versions.

    An empty version means the newest that pip finds. What it found is kept until `make clean`.
    A row has either trl or lightning; the version of the other is None. With trl and peft, it also
    runs the tests of preference training.
    """

    name: str
    python: str
    torch: str
    transformers: str = ""
    accelerate: str = ""
    trl: str | None = ""
    datasets: str = ""
    lightning: str | None = None
    peft: str | None = None

    @property
    def base(self) -> str:
        """The name of the environment with Python, torch and the test tools of this row."""
        return f"base-py{self.python}-torch{self.torch}"

    @property
    def requirements(self) -> list[str]:
        """What pip installs over the base."""
        return [f"{name}=={pin}" if pin else name for name, pin in self.pins.items()]

    @property
    def pins(self) -> dict[str, str]:
        """{package: its version}"""
        pins = {name: getattr(self, name) for name in PACKAGES}
        return {name: pin for name, pin in pins.items() if pin is not None}

    @property
    def extras(self) -> str:
        """The extras of ours whose tests a row runs."""
        return ",".join(["hf", *(n for n in ("trl", "peft", "lightning") if n in self.pins)])

    @property
    def tests(self) -> tuple[str, ...]:
        """The files and folders that pytest runs."""
        if self.lightning is not None:
            return LOOPS
        return (*HF, *TRL, *(() if self.peft is None else PREFERENCE))


# Versions that were newest together, but for those that somebody holds back on purpose.
ROWS = (
    Row("floor", "3.10", "2.4.1", "4.51.3", "1.6.0", "0.19.0", "3.0.0"),
    Row("4.51", "3.11", "2.13.0", "4.51.3", "1.6.0", "0.19.1"),
    Row("4.55", "3.11", "2.13.0", "4.55.4", "1.10.1", "0.22.2"),
    Row("4.57", "3.11", "2.13.0", "4.57.6", "1.10.1", "0.21.0"),
    Row("4.57-trl", "3.11", "2.13.0", "4.57.6", "", "0.24.0"),
    Row("5.0", "3.11", "2.13.0", "5.0.0", "1.12.0", "0.29.1", peft=""),
    Row("5.6", "3.11", "2.13.0", "5.6.2", "1.13.0", "0.29.1", peft=""),
    Row("5.9", "3.11", "2.13.0", "5.9.0", "1.13.0", "1.5.1", peft=""),
    Row("5.15", "3.11", "2.13.0", "5.15.1", "1.14.0", "1.9.2", peft=""),
    Row("5.17", "3.11", "2.13.0", "5.17.0", "1.15.0", "1.12.0", peft=""),
    Row("newest", "3.13", "2.15.0", peft=""),
    Row("loops-floor", "3.10", "2.4.1", "4.51.3", "1.6.0", None, "3.0.0", "2.6.0", "0.12.0"),
    Row("loops-newest", "3.13", "2.15.0", trl=None, lightning="", peft=""),
)
