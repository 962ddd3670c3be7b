"""A file is written whole or not at all; what is no file is written to in place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from channel_metrics.analysis.whole_file import whole_file


def test_it_has_the_rights_of_a_new_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "new" / "a") as part:
        part.write_text("x")
    (tmp_path / "b").touch()
    assert (tmp_path / "new" / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_an_error_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError), whole_file(file) as part:
        part.write_text("new \ud800", encoding="utf-8")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_a_link(tmp_path: Path, is_there: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if is_there:
        target.write_text("old")
    link.symlink_to(target)
    with whole_file(link) as part:
        part.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    """As a device such as `/dev/null` does, which root could replace."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with whole_file(pipe) as part:
            part.write_text("new")
        assert pipe.is_fifo() and os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]
