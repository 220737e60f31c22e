"""README.md and the settings file say what is declared."""

from __future__ import annotations

import os
import re

import pytest
from docs import MANUAL, README, lists, tables, written, written_page
from support import ROOT

import nocloud


@pytest.mark.parametrize("name", tables())
def test_the_tables_are_those_that_make_docs_writes(name: str) -> None:
    assert f"<!-- {name} -->\n\n{tables()[name]}\n\n<!-- end -->" in README.read_text(), "make docs writes them"


@pytest.mark.parametrize("name", lists())
def test_the_manuals_lists_are_those_that_make_docs_writes(name: str) -> None:
    assert f'\n.\\" {name}\n{lists()[name]}\n.\\" end\n' in MANUAL.read_text(), "make docs writes them"


def test_make_docs_mends_what_was_changed_by_hand() -> None:
    """A word in a row, a row that went, and nothing else."""
    text = README.read_text()
    row = "| `cpu=N` | processors |\n"
    assert text.count(row) == 1
    for changed in (text.replace(row, ""), text.replace(row, row.replace("N", "M")), text):
        assert written(changed) == text
    with pytest.raises(KeyError, match="nothing"):
        written(text + "<!-- nothing -->\n<!-- end -->\n")
    page = MANUAL.read_text()
    assert page.count("\nprocessors\n") >= 1
    assert written_page(page.replace("\nprocessors\n", "\n")) == written_page(page) == page
    with pytest.raises(KeyError, match="NOTHING"):
        written_page(page + '.\\" NOTHING\n.\\" end\n')


def test_what_is_declared_is_in_the_tables() -> None:
    listed = re.findall(r"^(nocloud[ -][a-z-]+|vm[a-z]*)", section("Commands"), re.M)
    for command in nocloud.visible_commands():
        assert {command.alias, f"nocloud {command.name}"} & {*listed} or command.name in ("completion", "man")
    for option in nocloud.CLONE_OPTIONS:
        assert f"| `{option.text}` |" in tables()["description options"]
    for status in (value for name, value in vars(nocloud).items() if name.startswith("EXIT_") and type(value) is int):
        assert f"\n| {status} | " in tables()["exit statuses"]


def test_the_examples_options_are_declared() -> None:
    """Of each command line that README.md shows."""
    names = {name: each for each in nocloud.visible_commands() for name in (each.alias, f"nocloud {each.name}") if name}
    shown = re.findall(r"^(?:\$ )?((?:vm|nocloud).*?)(?:  +#.*)?$", README.read_text(), re.M)
    assert len(shown) > 40
    for line in shown:
        found = re.match(r"(?:\$ )?(nocloud [a-z-]+|[a-z-]+)", line)
        command = names.get(found[1]) if found else None
        if not command or command.name == "ssh":  # its options are ssh's
            continue
        words = re.sub(r"'[^']*'", "", line[len(found[1]) :]) if found else ""
        options = {*command.options, *nocloud.GENERAL_OPTIONS}
        for word in re.findall(r"(?<![\w-])--?[A-Za-z][a-z0-9-]*", words):
            assert any(word in option.names for option in options), (line, word)


def test_the_settings_file_has_every_key() -> None:
    """With its default, if it has one; commented out are those that say only what holds without them."""
    text = (ROOT / "etc/nocloud_net.conf").read_text()
    lines = re.sub(r"^#(\w+=)", r"\1", text, flags=re.M)
    found = {each.key: each.value for each in nocloud.parse_assignments(lines, "nocloud_net.conf", {})}
    for setting in nocloud.SETTINGS:
        if setting.where in ("config", "both"):
            assert setting.key in found, f"{setting.key}: write it into etc/nocloud_net.conf, with its default"
            assert found[setting.key] == os.path.expanduser(setting.default) or not setting.default, setting.key


def test_the_two_commands_are_there() -> None:
    assert "make demo" in README.read_text() and "make test" in README.read_text()


def section(title: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README.read_text(), re.M | re.S)
    assert found, title
    return found.group(1)


def test_what_one_can_rely_on_has_its_tests() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = [row.split(" | ") for row in section("What you can rely on").splitlines() if row.startswith("| ")][2:]
    assert len(rows) > 10
    for _, named in rows:
        found = re.findall("`(test_[a-z0-9_]+)`", named)
        assert found and all(f"def {name}(" in tests for name in found), named


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
    ("What guests reach", "all", "vmHostAccess"),
    ("vmrun -r", "destroyed", "--destroy"),
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
