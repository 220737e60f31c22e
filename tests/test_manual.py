"""The manual page, as the programs that show it read it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from docs import MANUAL, written_page
from support import Cloud, Terminal

import nocloud


def shown(cloud: Cloud, text: str) -> str:
    """What man shows of it on a wide terminal."""
    need("man")
    (cloud.home / "x").write_text(text)
    done = cloud.execute(["man", "./x"], env={"MANWIDTH": "200", "LC_ALL": "C.UTF-8", "MANPAGER": "cat"}).ok()
    return re.sub(".\b", "", done.stdout)


def need(program: str) -> str:
    path = shutil.which(program)
    if not path:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed: make test installs it")
        pytest.skip(f"{program} is not installed; make test installs it")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "nocloud.1"
    with Cloud(path.parent / "home") as cloud:
        path.write_text(cloud.run("man").ok().stdout)
    return path


@pytest.mark.parametrize(
    "checker",
    [
        ("man", "-l", "--warnings", "-Tutf8"),
        ("groff", "-ww", "-man", "-Tutf8"),
        ("groff", "-ww", "-man", "-Tascii"),
        ("mandoc", "-Tlint", "-Wstyle"),
    ],
    ids=" ".join,
)
def test_no_program_complains_of_it(cloud: Cloud, checker: tuple[str, ...], page: Path) -> None:
    done = cloud.execute([need(checker[0]), *checker[1:], page])
    assert (done.status, done.stderr) == (0, "") and (checker[0] != "mandoc" or done.stdout == ""), repr(done)


def test_lists_can_be_broken() -> None:
    """A list that grows by a word must not become one that no line has room for."""
    for command in nocloud.visible_commands():
        for option in command.options:
            assert all(len(word) < 40 for word in option.help.split()), (command.name, option.names)


def test_every_command_option_and_setting_is_named(cloud: Cloud, page: Path) -> None:
    text = shown(cloud, page.read_text())
    for command in nocloud.COMMANDS.values():
        if command.hidden:
            assert f"nocloud {command.name}" not in text
            continue
        own = text.partition(f"nocloud {command.name}")[2].partition("\n\n   ")[0]
        assert own and (command.alias in text), command.name
        for option in command.options:
            for name in option.names:
                assert re.search(rf"{name}(?![\w-])", text), (command.name, name)
    for setting in nocloud.SETTINGS:
        assert re.search(rf"\b{setting.key}\b", text), setting.key
    for each in nocloud.CLONE_OPTIONS:
        assert re.search(rf"^ +{re.escape(each.text)}\s+{re.escape(each.help[:20])}", text, re.M), each.name
    assert not re.search("@[A-Z_]+@", text)
    for title in (
        "NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "CONFIGURATION", "FILES", "EXIT STATUS", "ENVIRONMENT",
        "SIGNALS", "EXAMPLES", "SEE ALSO",
    ):  # fmt: skip
        assert f"\n{title}\n" in text, title
    for status in (0, 1, 2, 124, 127, 130):
        assert re.search(rf"^ +{status} ", text, re.M)


def test_on_a_terminal_it_is_shown(cloud: Cloud) -> None:
    need("man")
    with Terminal(cloud, "man", env={"MANPAGER": "cat"}) as terminal:
        assert ".TH" not in terminal.see("NOCLOUD(1)")


def test_what_roff_would_take_for_something_else(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these comes out as it went in, so that it can be copied from the page and typed."""
    hard = r"""'a' "b" `c` ^d ~e -f --g \h \\fBi \e .j 'k"""
    for key, text in (("vmMem", hard), ("vmCpu", ".dot"), ("vmUser", "'quote")):
        monkeypatch.setattr(nocloud.SETTING[key], "help", text)
    text = shown(cloud, written_page(MANUAL.read_text()))
    assert hard in text and " .dot " in text and " 'quote " in text
    assert cloud.execute([need("groff"), "-ww", "-man", "-Tutf8", cloud.home / "x"]).ok().stderr == ""
