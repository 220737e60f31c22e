"""Writes README.md's tables, and the manual page's lists, from what nocloud.py declares: `make docs`.

A table stands between `<!-- NAME -->` and `<!-- end -->`, a list of etc/man/nocloud.man between the comments
`NAME` and `end`; tests/test_docs.py fails where one differs.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nocloud

README = Path(nocloud.__file__).parent / "README.md"
MANUAL = README.parent / "etc/man/nocloud.man"

EXIT_STATUSES = {
    nocloud.EXIT_DONE: "done",
    nocloud.EXIT_FAILED: "it could not be done, or one of the VMs failed",
    nocloud.EXIT_USAGE: "wrong usage, or a mistake in a file",
    nocloud.EXIT_DIFFERS: "vmapply --dry-run: there is something to do",
    nocloud.EXIT_TIMEOUT: "a wait ran out",
    nocloud.EXIT_MISSING: "unknown command, or a program is missing",
    nocloud.EXIT_INTERRUPTED: "interrupted",
}


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def code(text: object) -> str:
    return f"`{text}`" if text else "–"


def tables() -> dict[str, str]:
    """Each table by its name."""
    return {
        "exit statuses": table(
            ("exit status", "meaning"), [(str(status), text) for status, text in EXIT_STATUSES.items()]
        ),
        "description options": table(
            ("option", "meaning"), [(code(each.text), each.help) for each in nocloud.CLONE_OPTIONS]
        ),
    }


def put_in(text: str, places: str, known: dict[str, str]) -> str:
    """`text` with each part as it is known, by its name, in its place.  Raises KeyError for one that there isn't."""
    return re.sub(places, lambda match: f"{match[1]}{known[match[2]]}\n", text, flags=re.S | re.M)


def written(text: str) -> str:
    """The README with its tables as they should be."""
    known = {name: f"\n{each}\n" for name, each in tables().items()}
    return put_in(text, r"(<!-- (?!end )(.+?) -->\n).*?(?=<!-- end -->)", known)


# -- the manual page, in the man(7) macros of roff

ROFF = str.maketrans({  # what roff would take for something else: a hyphen, an accent, a typographic quote
    "\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", '"': "\\(dq",
    "^": "\\(ha", "~": "\\(ti", "…": "...", "×": "\\(mu", "–": "\\(en",
})  # fmt: skip


def roff(text: str) -> str:
    """`text` for the page, as it is; a dot at its beginning is no request."""
    return ("\\&" if text.startswith((".", "…")) else "") + text.translate(ROFF)


def bold(text: str) -> str:
    return f"\\fB{roff(text)}\\fP"


def wrapped(text: str) -> str:
    """A paragraph of running text, in lines that stay under 80 bytes."""
    return "\n".join(map(roff, textwrap.wrap(text, 60, break_long_words=False, break_on_hyphens=False)))


def man_items(rows: Iterable[tuple[str, str]]) -> str:
    """Entries of a list: each a term and what it means."""
    return "\n".join(f".TP\n{bold(term)}\n{wrapped(text)}" for term, text in rows)


def man_options(options: Iterable[nocloud.Option]) -> str:
    items = []
    for option in options:
        value = f" [{option.value}]" if option.is_optional else f" {option.value}" if option.value else ""
        names = ", ".join(bold(name) + roff(value) for name in option.names)
        default = f" (default: {option.default})" if option.default else ""
        items.append(f".TP\n{names}\n{wrapped(option.help + default)}")
    return "\n".join(items)


def man_settings(*places: str) -> str:
    rows = [(each.key, each.help, each.default) for each in nocloud.SETTINGS if each.where in places]
    return man_items((key, f"{help} [{default}]" if default else help) for key, help, default in rows)


def man_command(command: nocloud.Command) -> str:
    """How it is called, by each of its names, what it does, and its options."""
    names = filter(None, (command.alias, f"nocloud {command.name}"))
    usage = "\n.br\n".join(f"{bold(name)} {roff(command.usage)}".rstrip() for name in names)
    about = wrapped(command.help[0].upper() + command.help[1:])
    text = f".SS {bold(command.alias or command.name)}\n{usage}\n.PP\n{about}.\n{man_options(command.options)}"
    return text.rstrip("\n")


def lists() -> dict[str, str]:
    """Each list of the manual page by its name."""
    return {
        "DESCRIPTION OPTIONS": man_items((each.text, each.help) for each in nocloud.CLONE_OPTIONS),
        "GENERAL OPTIONS": man_options(nocloud.GENERAL_OPTIONS),
        "COMMANDS": "\n".join(map(man_command, nocloud.visible_commands())),
        "SETTINGS": man_settings("config", "both"),
        "CONF KEYS": man_settings("vm"),
        "UNUSED KEYS": wrapped(", ".join(each.key for each in nocloud.SETTINGS if each.where == "unused") + "."),
        "EXIT STATUSES": man_items((str(status), text) for status, text in EXIT_STATUSES.items()),
    }


def written_page(text: str) -> str:
    """The manual page with its lists as they should be."""
    return put_in(text, r'^(\.\\" (?!end$)([A-Z ]+)\n).*?(?=^\.\\" end$)', lists())


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
    MANUAL.write_text(written_page(MANUAL.read_text()))
