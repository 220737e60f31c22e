"""What a command that returned 0 has done survives a power cut; one that is cut off leaves a tree that can be used."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from powercut import LOSE_ALL, LOSE_DATA, CannotCut, CutCloud, CutDisk
from support import ROOT

FLATTEN = """
import sys
sys.path.insert(0, sys.argv[3])
import nocloud
with nocloud.Cloud(nocloud.load_config()) as cloud:
    template = cloud.tree.need_template(sys.argv[1])
    with nocloud.FolderLock(template.folder):
        if sys.argv[2] == "layer":
            nocloud.new_layer(template).adopt()
        else:
            nocloud.flatten(cloud, template)
"""


Words = Sequence[object]

HALT = b"\xfa\xf4\xeb\xfd"  # cli; hlt; and again: a guest that does nothing


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What can't be told from a disk: 6 MB of noise, which no zeros stand for."""
    raw, image = tmp_path / "image.raw", tmp_path / "image.qcow2"
    raw.write_bytes(
        HALT + random.Random(1).randbytes(510 - len(HALT)) + b"\x55\xaa" + random.Random(2).randbytes(6 << 20)
    )
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    return image


@pytest.fixture(params=["ext4", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("xfs", "btrfs"))])
def cut_cloud(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[CutCloud]:
    """A cloud on a disk whose power can be cut."""
    try:
        disk = CutDisk(tmp_path, request.param)
    except CannotCut as why:
        pytest.skip(f"the power can't be cut here: {why}")
    try:
        with CutCloud(disk) as cloud:
            yield cloud
    finally:
        disk.close()


class Steps:
    """Commands that make, change and remove things, one after the other, and what must be so after each."""

    def __init__(self, cloud: CutCloud, image: Path) -> None:
        self.cloud, self.image = cloud, image

    def all(self) -> Iterator[tuple[list[Words], Callable[[], None]]]:
        """(commands, what looks at what they have done)."""
        yield [["vmtemplate", "t", "--image", self.image, "--init", "systemd", "--mem", 32]], self.is_template("t")
        make = ["vminstantiate", "-n", "t", "-C", 2, "-g", "g", "-t", "x", "-o", "name=v;dsk=1"]
        yield [make], self.clones_run
        keep = ["vmtemplate", "kept", "--from", "g/v00", "--no-clean"]
        yield [["vmstop", "-g", "g", "--kill"], keep, ["vmstop", "-d", "-n", "g/v00"]], self.was_kept
        layered = ["vmtemplate", "lay", "--from", "g/v01", "--no-clean", "--layer"]
        yield [layered, ["vmstop", "-d", "-g", "g"]], self.is_template("lay")
        yield [["vmcreate", "-a", "-n", "kept", "-m", 48, "-d", 1]], self.was_adjusted
        yield [["layer", "kept"]], self.has_disk("kept.l1.img")
        yield [["flatten", "kept"]], self.has_disk("kept.l2.img")
        yield [["vmtemplate", "--delete", "lay"]], lambda: self.is_gone("templates/lay")

    def moments(self) -> Iterator[tuple[list[Words], Callable[[], None]]]:
        """The same, of snapshots and saved memory."""
        make = ["vminstantiate", "-n", "t", "-C", 2, "-g", "g", "-t", "x", "-o", "name=v"]
        made = [["vmtemplate", "t", "--image", self.image, "--init", "none", "--mem", 32], make]
        yield [*made, ["vmsnapshot", "one", "-g", "g", "--ram"]], self.has_snapshot
        yield [["vmrollback", "one", "-g", "g", "-y"]], self.has_snapshot
        yield [["vmstart", "v01"], ["vmstop", "--save", "-n", "v01"]], self.goes_on
        yield [["vmrollback", "one", "-n", "v01", "-y"], ["vmstop", "-n", "v01", "--kill"]], self.has_snapshot
        yield [["vmsnapshot", "--delete", "one"]], lambda: self.is_gone("g/x/v00/snapshots")

    def argv(self, words: Words) -> list[object]:
        if words[0] in ("layer", "flatten"):  # what vmupgrade does when its guest has ended
            return [sys.executable, "-IS", "-c", FLATTEN, words[1], words[0], ROOT]
        return [*self.cloud.argv(str(words[0]), *words[1:])]

    # what must be so

    def is_template(self, name: str) -> Callable[[], None]:
        return lambda: self.whole(f"templates/{name}")

    def whole(self, place: str) -> None:
        """Its conf names a disk, which is the image's."""
        conf = self.cloud.conf(place)
        assert conf["vmName"] and conf["vmUuid"]
        disk = self.cloud.base / conf["vmDisk"]
        for words in (["check", "-q", disk], ["compare", "-q", self.image, disk]):
            self.cloud.execute(["qemu-img", *words]).quiet()

    def clones_run(self) -> None:
        for name in ("v00", "v01"):
            self.whole(f"g/x/{name}")
            for suffix in ("", ".pub"):
                assert (self.cloud.folder(f"g/x/{name}") / f"ssh_host_ed25519_key{suffix}").read_text().strip()
            assert self.cloud.conf(f"g/x/{name}")["vmUuid"] in (self.cloud.base / ".known_hosts").read_text()
        assert (self.cloud.home / "config/nocloud/id_ed25519").read_text().startswith("-----BEGIN")
        self.cloud.run("vm", "-n", "v01", "-g", "g", "-G").ok()
        self.cloud.run("vmstop", "-g", "g", "--kill").ok()

    def has_snapshot(self) -> None:
        (line,) = self.cloud.run("vmsnapshot", "-L").ok().lines
        assert line.split()[0] == "one" and line.endswith("v00,v01")
        for name in ("v00", "v01"):
            self.whole(f"g/x/{name}")
            assert (self.cloud.folder(f"g/x/{name}") / "snapshots/one/memory").stat().st_size > 1 << 20

    def goes_on(self) -> None:
        self.whole("g/x/v01")
        assert (self.cloud.folder("g/x/v01") / "saved").exists()
        self.cloud.run("vmstart", "v01").ok()
        assert (self.cloud.folder("g/x/v01") / "late").exists(), "where it was"
        self.cloud.run("vmstop", "-n", "v01", "--kill").ok()

    def can_be_used(self) -> None:
        """What there is, is whole; the lists have nothing to complain of."""
        for words in (
            ["vmtemplate", "--list"],
            ["vmtemplate", "--tree"],
            ["vmrunning", "-a"],
            ["vminventory", "--list"],
        ):
            assert self.cloud.run(words[0], *words[1:]).ok().stderr == ""
        for conf in self.cloud.base.glob("*/**/*.conf"):
            if not any(part.startswith(".") for part in conf.relative_to(self.cloud.base).parts):
                self.whole(str(conf.parent.relative_to(self.cloud.base)))

    def is_gone(self, place: str) -> None:
        assert not self.cloud.folder(place).exists()

    def was_kept(self) -> None:
        self.whole("templates/kept")
        self.is_gone("g/x/v00")

    def was_adjusted(self) -> None:
        assert self.cloud.conf("templates/kept")["vmMem"] == "48"
        self.cloud.execute(["qemu-img", "check", "-q", self.cloud.base / "templates/kept/kept_0.img"]).quiet()
        assert "1 GiB" in self.cloud.execute(["qemu-img", "info", self.cloud.base / "templates/kept/kept_0.img"]).stdout

    def has_disk(self, name: str) -> Callable[[], None]:
        def look() -> None:
            assert self.cloud.conf("templates/kept")["vmDisk"] == f"templates/kept/{name}"
            disk = self.cloud.base / f"templates/kept/{name}"
            self.cloud.execute(["qemu-img", "check", "-q", disk]).quiet()
            assert self.cloud.execute(["qemu-img", "compare", self.image, disk]).status == 0

        return look


MOMENTS = pytest.param(Steps.moments, marks=pytest.mark.long)


@pytest.mark.parametrize("which", [Steps.all, MOMENTS])
@pytest.mark.parametrize("how", [LOSE_ALL, pytest.param(LOSE_DATA, marks=pytest.mark.long)])
def test_what_a_command_did_survives_a_power_cut(
    cut_cloud: CutCloud, image: Path, vms: None, how: int, which: Callable[[Steps], Any]
) -> None:
    """Cut as soon as it has returned 0."""
    steps = Steps(cut_cloud, image)
    for commands, look in which(steps):
        for words in commands:
            cut_cloud.execute(steps.argv(words)).ok()
        cut_cloud.cut(how)
        look()


@pytest.mark.long
@pytest.mark.parametrize("which", [Steps.all, Steps.moments])
def test_power_cuts_at_random_instants(
    cut_cloud: CutCloud, image: Path, vms: None, which: Callable[[Steps], Any]
) -> None:
    """While a command works, and up to 3 s after it: what returned 0 is there, and whatever is there can be used."""
    seed = int(os.environ.get("NOCLOUD_TEST_SEED") or time.time())
    print(f"NOCLOUD_TEST_SEED={seed}")
    chance, cuts, during = random.Random(seed), 0, 0
    steps = Steps(cut_cloud, image)
    for commands, look in which(steps):
        before, argvs = cut_cloud.disk.save(), list(map(steps.argv, commands))
        started = time.monotonic()
        assert cut_cloud.begin(argvs).wait() == 0
        usual = time.monotonic() - started
        cut_cloud.cut()
        for _ in range(8):
            cut_cloud.disk.restore(before)
            instant = chance.choice((chance.uniform(0, usual), usual + chance.uniform(0, 3)))
            child = cut_cloud.begin(argvs)
            time.sleep(instant)
            done = child.poll() == 0
            cut_cloud.cut(chance.choice((LOSE_ALL, LOSE_DATA)))
            child.wait()
            cuts, during = cuts + 1, during + (not done)
            print(f"{commands[0][:2]}: cut at {instant:.3f} s, {'done' if done else 'at work'}")
            steps.can_be_used()
            if done:
                look()
        cut_cloud.disk.restore(before)
        assert cut_cloud.begin(argvs).wait() == 0
        cut_cloud.cut()
    print(f"{cuts} cuts of the power, {during} of them while a command was at work")
    assert cuts >= 40 and during >= 10
