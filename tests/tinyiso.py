"""A bootable ISO of the tiny guest: what an installer's CD is to a real machine, in 15 MB.

isolinux starts the same kernel and initramfs as on the tiny guest's disk; it runs from memory where /dev/vda is empty.
The host needs isolinux, syslinux-common and xorriso besides what tinyguest.py needs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import tinyguest

BOOT_FILES = (Path("/usr/lib/ISOLINUX/isolinux.bin"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"))


def build(cache: Path) -> Path:
    """The path of the ISO, made at the first call."""
    cache = cache.absolute()
    image = cache / f"tinyguest-{tinyguest._digest('iso', Path(__file__).read_text())}.iso"
    with tinyguest._locked(cache):
        if not image.exists():
            parts = tinyguest._parts(cache)
            with tempfile.TemporaryDirectory(prefix="tinyiso-", dir=cache) as work:
                _make(Path(work), parts).rename(image)
    return image


def _make(work: Path, parts: Path) -> Path:
    tree, image = work / "tree", work / "image.iso"
    tree.mkdir()
    for path in (*BOOT_FILES, parts / "vmlinuz", parts / "initrd"):
        shutil.copy(path, tree)
    settings = {"IFNAME": "", "CLIENT_ID": "", "READS": ""}
    (tree / "variant").write_bytes(tinyguest._variant(None, settings))
    (tree / "isolinux.cfg").write_text(tinyguest.SYSLINUX_CFG)
    tinyguest._run(
        "xorriso", "-as", "mkisofs", "-quiet", "-V", "TINYGUEST", "-J", "-R", "-o", image,
        "-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", tree,
    )  # fmt: skip
    return image


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
