"""The agent's command line, where it is served outside its image."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from agent.settings import SETTINGS, Given, Setting
from agent.workload_config import WORKLOAD_KEYS
from protocol.spelling import misspelt_flag

_WORKLOAD = "--workload"


def from_arguments(argv: Sequence[str]) -> dict[str, Given]:
    """The settings that the arguments hold, by key.

    Raises:
        SystemExit: ``--help``, or arguments that do not parse; argparse has said why.
    """
    parser = argparse.ArgumentParser(
        prog="python -m agent",
        description="innkeep's agent, served outside its image: disks, links and power are left "
        "alone, and mounts stay in a mount namespace of its own.",
        allow_abbrev=False,
    )
    settings = [setting for setting in SETTINGS if setting.flag]
    for setting in settings:
        _add(parser, setting)
    parser.add_argument(
        _WORKLOAD,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"as innkeep.workload.KEY of a boot ({', '.join(WORKLOAD_KEYS)}); may be repeated",
    )
    flags = [setting.flag for setting in settings if setting.flag]
    if (complaint := misspelt_flag(argv, [*flags, _WORKLOAD, "--help"])) is not None:
        parser.error(complaint)
    parsed = vars(parser.parse_args(argv))
    given = {
        setting.key: Given(setting.flag, text)
        for setting in settings
        if setting.flag and (text := _text(setting, parsed[setting.key])) is not None
    }
    for pair in parsed["workload"]:
        key, _, text = pair.partition("=")
        given[f"workload.{key}"] = Given(f"{_WORKLOAD} {key}", text)
    return given


def _add(parser: argparse.ArgumentParser, setting: Setting) -> None:
    assert setting.flag is not None
    # argparse formats what it is told.
    meaning = setting.meaning.replace("`", "").replace("%", "%%")
    if setting.metavar is None:
        parser.add_argument(setting.flag, dest=setting.key, action="store_true", help=meaning)
        return
    parser.add_argument(
        setting.flag,
        dest=setting.key,
        action="append",
        required=setting.required,
        metavar=setting.metavar,
        help=meaning,
    )


def _text(setting: Setting, found: list[str] | bool | None) -> str | None:
    if not found:
        return None
    if found is True:
        return "1"
    texts = found if setting.is_list else found[-1:]
    return ",".join(str(Path(each).absolute()) if setting.is_path else each for each in texts)
