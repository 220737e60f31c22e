"""Writes README.md's tables from what nocloud.py declares: `make docs`.

A table stands between `<!-- NAME -->` and `<!-- end -->`; tests/test_docs.py fails where it differs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nocloud

README = Path(nocloud.__file__).parent / "README.md"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def code(text: object) -> str:
    return f"`{text}`" if text else "–"


def tables() -> dict[str, str]:
    """Each table by its name."""
    return {
        "exit statuses": table(
            ("exit status", "meaning"), [(str(status), text) for status, text in nocloud.EXIT_STATUSES.items()]
        ),
        "description options": table(
            ("option", "meaning"), [(code(each.text), each.help) for each in nocloud.CLONE_OPTIONS]
        ),
    }


def written(text: str) -> str:
    """The README with its tables as they should be.  Raises KeyError for one that there isn't."""
    known = tables()
    return re.sub(
        r"(<!-- (?!end )(.+?) -->\n).*?(?=<!-- end -->)",
        lambda match: f"{match[1]}\n{known[match[2]]}\n\n",
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
