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


def section(title: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README.read_text(), re.M | re.S)
    assert found, title
    return found.group(1)


# What the contract calls fixed, typed by hand: words of the row that tells it, before and now.
FIXED = [
    ("Wrong usage", "0", "exit status 2"),
    ("vmcreate -a", "forgot the disks", "keeps the rest"),
    ("vminstantiate -f", "dropped", "count"),
    ("Clones", "tenth one failed, and existing ones were overwritten", "after the highest"),
    ("vmrun -f", "overwrote them, and ^C destroyed them", "--add"),
    ("vmstop", "pulled the plug", "properly"),
    ("Names", "prefix", "whole"),
    ("MAC and address", "new at each start", "kept"),
    ("template that has clones", "broke", "never written"),
    ("vminventory --list", "trailing commas", "strict JSON"),
    ("Configuration", "sourced", "never run"),
    ("Host keys", "not checked", "own"),
    ("network", "root", "private"),
    ("Screen, monitor, console", "TCP", "unix sockets"),
]


@pytest.mark.parametrize(("what", "before", "now"), FIXED)
def test_coming_from_the_bash_tools(what: str, before: str, now: str) -> None:
    """One table; each thing that changed is a row of it."""
    text = section("Coming from the bash tools")
    assert text.count("| --- | --- | --- |") == 1
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert all(len(row) == 3 for row in rows), rows
    (row,) = (row for row in rows if what in row[0].replace("`", ""))
    assert before in row[1] and now in row[2].replace("`", ""), row


def test_old_keys_are_told() -> None:
    """Every option letter stays, and every key is read; those that mean nothing any more are not kept silent about."""
    text = section("Coming from the bash tools")
    for key in ("vmSpicePassword", "vmMemVid", "vmBackend", "netInterface", "vmCpuCap"):
        assert key in text and key in nocloud.SETTING
