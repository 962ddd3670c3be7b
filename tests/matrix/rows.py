"""The sets of versions that `make matrix` installs, and the tests that it runs with each."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HF", "ROWS", "TRL", "Row"]

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


@dataclass(frozen=True)
class Row:
    """One set of versions.

    An empty version means the newest that pip finds. What it found is kept until `make clean`.
    """

    name: str
    python: str
    torch: str
    transformers: str = ""
    accelerate: str = ""
    trl: str = ""
    datasets: str = ""

    @property
    def base(self) -> str:
        """The name of the environment with Python, torch and the test tools of this row."""
        return f"base-py{self.python}-torch{self.torch}"

    @property
    def requirements(self) -> list[str]:
        """What pip installs over the base."""
        names = ("transformers", "accelerate", "trl", "datasets")
        pins = {name: getattr(self, name) for name in names}
        return [f"{name}=={pin}" if pin else name for name, pin in pins.items()]

    @property
    def tests(self) -> tuple[str, ...]:
        """The files and folders that pytest runs."""
        return (*HF, *TRL)


# Versions that were newest together, but for those that somebody holds back on purpose.
ROWS = (
    Row("floor", "3.10", "2.4.1", "4.51.3", "1.6.0", "0.19.0", "3.0.0"),
    Row("4.51", "3.11", "2.13.0", "4.51.3", "1.6.0", "0.19.1"),
    Row("4.57", "3.11", "2.13.0", "4.57.6", "1.10.1", "0.21.0"),
    Row("4.57-trl", "3.11", "2.13.0", "4.57.6", "", "0.24.0"),
    Row("5.0", "3.11", "2.13.0", "5.0.0", "1.12.0", "0.29.1"),
    Row("5.6", "3.11", "2.13.0", "5.6.2", "1.13.0", "0.29.1"),
    Row("5.9", "3.11", "2.13.0", "5.9.0", "1.13.0", "1.5.1"),
    Row("5.15", "3.11", "2.13.0", "5.15.1", "1.14.0", "1.9.2"),
    Row("newest", "3.13", "2.14.1"),
)
