"""Asks the real servers for every entry of the catalogue: the checksum file, and whether the image it names is there.

For machines with Internet: `make check-catalogue`. Nothing is downloaded but checksum files and headers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nocloud


def check(catalogue: nocloud.Catalogue, name: str, web: nocloud.Web) -> str:
    """What the entry means today; raises nocloud.Error where it means nothing."""
    source = nocloud.resolve(catalogue, catalogue.need(name), web)
    if isinstance(source, nocloud.ClassicSource):
        pieces = f"{source.urls[0]}{source.name}.img"
        return f"{pieces}, {source.algorithm}:{source.digest[:12]}…"
    for url in source.urls:
        try:
            answer = web.open(url, method="HEAD")
        except nocloud.Absent:
            if url == source.urls[-1]:
                raise
            continue
        with answer:
            size = int(answer.headers.get("Content-Length") or 0)
        if size < nocloud.MIB:
            raise nocloud.WebError(f"{url}: {size} bytes are no image")
        return f"{url}, {size // nocloud.MIB} MB, {source.algorithm}:{source.digest[:12]}…"
    raise AssertionError("an entry has at least one URL")


def main(names: list[str]) -> int:
    catalogue, web, failed = nocloud.load_catalogue(), nocloud.Web(30), []
    for name in names or list(catalogue.entries):
        try:
            print(f"{name}: {check(catalogue, name, web)}", flush=True)
        except nocloud.Error as error:
            failed.append(name)
            print(f"{name}: WRONG: {error}", flush=True)
    total = len(names or catalogue.entries)
    print(f"{total - len(failed)} of {total} entries are right, {time.strftime('%Y-%m-%d')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
