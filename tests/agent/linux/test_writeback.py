"""Dirty pages are handed to the disk, and a bad descriptor is told by errno."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from agent.linux.writeback import sync_file_range


def test_what_is_dirty_in_a_file_is_written_without_changing_it(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"x" * 100_000)
        file.flush()
        sync_file_range(file.fileno())
        sync_file_range(file.fileno(), 4096, 8192)
    assert (tmp_path / "file").read_bytes() == b"x" * 100_000


def test_a_descriptor_that_is_none_is_told() -> None:
    with pytest.raises(OSError) as raised:  # noqa: PT011
        sync_file_range(-1)
    assert raised.value.errno == errno.EBADF
