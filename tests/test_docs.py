"""README.md names every command and every setting."""

from __future__ import annotations

import re

import pytest
from support import ROOT

import nocloud

README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="there is no README.md yet")


def words() -> set[str]:
    return set(re.findall(r"[A-Za-z][A-Za-z0-9-]*", README.read_text()))


def test_every_command_is_named() -> None:
    for command in nocloud.COMMANDS.values():
        if not command.hidden:
            assert (command.alias or command.name) in words(), command.name


def test_every_setting_is_named() -> None:
    missing = [
        setting.key
        for setting in nocloud.SETTINGS
        if setting.where in ("config", "both") and setting.key not in words()
    ]
    assert missing == []


def test_the_two_commands_are_there() -> None:
    assert "make demo" in README.read_text() and "make test" in README.read_text()
