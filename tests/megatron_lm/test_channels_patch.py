"""The patch: applied once, undone wholly, and refused where Megatron lacks what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from megatron_lm.launch import has_module, needs_megatron_training

TESTS = Path(__file__).resolve().parents[1]
START = """
from megatron_lm import cpu
cpu.install()
import megatron.core.utils
names = ("training_log", "evaluate", "save_checkpoint", "get_forward_backward_func")
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A fresh process: what is patched here would stay patched for the tests after this one."""
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n" + START + dedent(code))
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@needs_megatron_training
def test_applied_once_and_undone(tmp_path: Path) -> None:
    done = python(
        """
        from megatron.training import arguments, training
        from megatron.core import utils
        owners = [(training, n) for n in names]
        owners += [(arguments, "validate_args"), (utils, "get_batch_on_this_cp_rank")]
        before = [getattr(owner, name) for owner, name in owners]
        import channel_metrics.patches.megatron as patch
        assert patch.is_applied()
        once = [getattr(owner, name) for owner, name in owners]
        assert all(a is not b for a, b in zip(before, once))
        patch.apply()
        assert [getattr(owner, name) for owner, name in owners] == once
        patch.revert()
        assert not patch.is_applied()
        assert [getattr(owner, name) for owner, name in owners] == before
        patch.apply()
        assert patch.is_applied()
        print("done")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
    assert done.stdout.count("channel metrics: patched megatron-core") == 2


@needs_megatron_training
def test_a_version_without_a_hook_point_is_refused_whole(tmp_path: Path) -> None:
    done = python(
        """
        from megatron.training import arguments, training
        before = [getattr(training, name) for name in names]
        log, training.training_log = training.training_log, None
        del training.training_log
        try:
            import channel_metrics.patches.megatron
        except ValueError as error:
            print(error)
        training.training_log = log
        assert [getattr(training, name) for name in names] == before
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "lacks: megatron.training.training.training_log; --channels needs" in done.stdout
    assert "megatron-core 0.19" in done.stdout


@pytest.mark.skipif(
    has_module("megatron.training"),
    reason="here is megatron.training; `make test` runs this where it is not",
)
def test_without_the_training_loop_the_error_says_where_it_is(tmp_path: Path) -> None:
    done = python("import channel_metrics.patches.megatron", tmp_path)
    assert done.returncode == 1
    assert "--channels needs Megatron-LM core 0.13 or later" in done.stderr
    assert "megatron-core 0.16.1 lacks: megatron.training.arguments (No module named" in done.stderr
    assert "your own loop can use channel_metrics.trainers.megatron" in done.stderr
