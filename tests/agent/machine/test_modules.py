"""Modules for later: loaded in their order, and missed by nobody. None is loaded here."""

import errno
import logging
import os
from pathlib import Path

import pytest

from agent.machine.modules import load_later


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "later").write_text("button.ko\nevdev.ko\nptp_kvm.ko\ngone.ko\n")
    for name in ("button", "evdev", "ptp_kvm"):
        (tmp_path / f"{name}.ko").write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("code", "level"),
    [
        (errno.EOPNOTSUPP, logging.DEBUG),
        (errno.ENOSYS, logging.DEBUG),
        (errno.EINVAL, logging.WARNING),
    ],
)
def test_one_that_cannot_be_loaded_does_not_keep_the_others(
    folder: Path, caplog: pytest.LogCaptureFixture, code: int, level: int
) -> None:
    asked = []

    def finit_module(descriptor: int) -> None:
        asked.append(os.pread(descriptor, 100, 0).decode())
        if asked[-1] == "button":
            raise OSError(code, os.strerror(code))

    caplog.set_level(logging.DEBUG)
    assert load_later(folder, finit_module) == ["evdev", "ptp_kvm"]
    assert asked == ["button", "evdev", "ptp_kvm"]
    first, last = caplog.records
    assert (first.levelno, first.getMessage()) == (level, f"load button.ko: {os.strerror(code)}")
    assert last.levelno == logging.WARNING
    assert "gone.ko" in last.getMessage()


def test_a_tree_without_modules_has_none_to_load(tmp_path: Path) -> None:
    assert load_later(tmp_path / "none", lambda _: pytest.fail("there is none")) == []
