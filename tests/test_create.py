"""vmcreate: a template from a bootable ISO, and changes to one that is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinyiso
from support import READY, Cloud, eventually, nothing_made


@pytest.fixture(scope="session")
def iso(guest_cache: Path) -> Path:
    """A bootable ISO with the tiny guest."""
    return tinyiso.build(guest_cache)


def disk_size(cloud: Cloud, vm: str) -> int:
    import json

    image = next(cloud.folder(vm).glob("*_0.img"))
    info = json.loads(cloud.execute(["qemu-img", "info", "-U", "--output=json", image]).ok().stdout)
    return int(info["virtual-size"]) >> 20


@pytest.mark.long
def test_an_installer_runs(cloud: Cloud, iso: Path, vms: None) -> None:
    words = ("-n", "fresh", "-i", iso, "-m", 160, "-c", 1, "-d", 3, "-C", 50)
    done = cloud.run("vmcreate", *words).ok()
    assert done.stdout == ""
    assert "no display" in done.stderr
    assert "vmconsole" in done.stderr
    conf = cloud.conf("templates/fresh")
    wanted = {
        "vmName": "fresh",
        "vmMem": "160",
        "vmCpu": "1",
        "vmCpuCap": "50",
        "vmDisk": "templates/fresh/fresh_0.img",
    }
    assert {key: conf[key] for key in wanted} == wanted
    assert disk_size(cloud, "templates/fresh") == 3 * 1024
    assert cloud.run("vmrunning").ok().stdout.split()[:2] == ["fresh", "templates"]
    console = cloud.folder("templates/fresh") / "console.log"
    eventually(lambda: b"ready after" in console.read_bytes(), "the ISO has booted", 90)
    words_for_guest = "cat /proc/partitions\necho written >/dev/vda; sync\nhead -n 1 /dev/vda\n"
    seen = cloud.run("vmconsole", "-s", "-n", "fresh", input=words_for_guest).ok().stdout
    assert f"{3 << 20} vda\n" in seen  # in KB
    assert "\nwritten\n" in seen
    cloud.run("vmcreate", "-n", "fresh", "-a", "-m", 512).says(1, "fresh: it is running", "vmstop -n fresh")
    cloud.run("vmcreate", *words).fails(1, "fresh", "already")
    cloud.run("vmstop", "-n", "fresh", "--kill").ok()
    cloud.run("vminstantiate", "-n", "fresh", "-g", "pf", "--dry-run").ok()


@pytest.mark.long
def test_the_disk_boots_where_no_iso_is_given(tiny: Cloud, iso: Path) -> None:
    """An ISO comes first only when it is given, and is gone at the next start."""
    tiny.run("vmcreate", "-n", "tiny", "-a", "-i", iso).ok()
    console = tiny.folder("templates/tiny") / "console.log"
    eventually(lambda: b"ready after" in console.read_bytes(), "the ISO has booted", 90)
    seen = tiny.run("vmconsole", "-s", "-n", "tiny", input=". /etc/tinyguest.conf; echo reads=$READS.\n").ok().stdout
    assert "reads=." in seen  # what the ISO's variant says; the disk's says more
    tiny.run("vmstop", "-n", "tiny", "--kill").ok()
    command = tiny.folder("templates/tiny") / "tiny.command"
    assert "ide-cd" in command.read_text()
    tiny.start("templates/tiny").ok()
    assert "ide-cd" not in command.read_text()
    tiny.run("vmstop", "-n", "tiny", "--kill").ok()


def test_names_in_iso_dir(cloud: Cloud, iso: Path, vms: None, tmp_path: Path) -> None:
    folder = tmp_path / "isos"
    folder.mkdir()
    (folder / "tiny, first.iso").symlink_to(iso)
    (folder / "text.iso").write_text("no image" * 8192)
    env = {"NOCLOUD_isoDir": str(folder)}
    with nothing_made(cloud):
        cloud.run("vmcreate", "-n", "one", "-i", "tiny, fist", env=env).fails(1, "no such ISO", "tiny, first.iso")
        cloud.run("vmcreate", "-n", "one", "-i", "text", env=env).fails(1, "not an ISO")
        cloud.run("vmcreate", "-n", "one", "-i", "./text.iso", env=env).fails(1, "no such ISO")
    for number, name in enumerate(("tiny, first.iso", "tiny, first", folder / "tiny, first.iso")):
        cloud.run("vmcreate", "-n", f"t{number}", "-m", 32, "-i", name, env=env).ok()
        assert "tiny,, first.iso" in (cloud.folder(f"templates/t{number}") / f"t{number}.command").read_text()
        cloud.run("vmstop", "-n", f"t{number}", "--kill").ok()


def test_wrong_words(blank: Cloud) -> None:
    for words in (
        [], ["-n", "x"], ["-i", "x"], ["-n", "x", "-i", ""], ["-n", "blank", "-a"], ["-a", "-m", 64],
        ["-n", "x", "-i", "y", "-m", "1G"], ["-n", "x", "-i", "y", "-C", "101"], ["-n", "x", "-i", "y", "z"],
    ):  # fmt: skip
        blank.run("vmcreate", *words).fails(2)
    blank.run("vmcreate", "-a", "-n", "nothing", "-m", 64).fails(1, "nothing")


def test_bad_names_are_refused(cloud: Cloud, iso: Path) -> None:
    with nothing_made(cloud):
        for name in ("../x", "a b", "a,b", ".x", "-x", "x" * 64):
            cloud.run("vmcreate", f"-n{name}", "-i", iso).fails(2)


def test_one_that_does_not_start_leaves_nothing(cloud: Cloud, iso: Path, vms: None) -> None:
    env = {"NOCLOUD_vmExtraOpts": "-device nonsense"}
    cloud.run("vmcreate", "-n", "fresh", "-m", 32, "-i", iso, env=env).fails(1, "fresh", "nonsense")
    env = {"NOCLOUD_vmExtraOpts": "-name 'a"}
    cloud.run("vmcreate", "-n", "fresh", "-m", 32, "-i", iso, env=env).fails(2, "fresh", "vmExtraOpts", "'a")
    assert not (cloud.base / "templates" / "fresh").exists()


def test_adjust_changes_what_is_given(blank: Cloud) -> None:
    conf = blank.base / "templates/blank/blank.conf"
    conf.write_text("# mine\n" + conf.read_text() + "oddKey='kept as it is'\n")
    before = conf.read_text()
    disk = next(conf.parent.glob("*_0.img"))
    content = disk.read_bytes()
    blank.run("vmcreate", "-n", "blank", "-a", "-m", 1024).quiet()
    assert conf.read_text() == before.replace("vmMem=32", "vmMem=1024")
    blank.run("vmcreate", "-an", "blank", "-c", 3).quiet()
    assert conf.read_text() == before.replace("vmMem=32", "vmMem=1024").replace("vmCpu=1", "vmCpu=3")
    assert disk.read_bytes() == content
    blank.run("vmcreate", "-a", "-n", "blank", "-C", 70).quiet()
    assert blank.conf("templates/blank")["vmCpuCap"] == "70"


def test_adjust_grows_the_disk(blank: Cloud) -> None:
    blank.run("vmcreate", "-n", "blank", "-a", "-d", 20).quiet()
    assert disk_size(blank, "templates/blank") == 20 * 1024
    blank.run("vmcreate", "-n", "blank", "-a", "-d", 20).quiet()
    blank.run("vmcreate", "-n", "blank", "-a", "-d", 19, "-m", 64).says(
        1, "blank: its disk has 20 GB and never shrinks", "-d takes a larger size, in GB"
    )
    assert blank.conf("templates/blank")["vmMem"] == "32"
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=b").ok()
    with nothing_made(blank):
        done = blank.run("vmcreate", "-n", "blank", "-a", "-d", 30)
        done.says(1, "blank: 1 clone would break: pf/default/b00", "vmstop -d destroys clones")
        blank.run("vmcreate", "-n", "b00", "-a", "-d", 30).says(1, "b00: it is running", "vmstop -n b00")
        blank.run("vmcreate", "-n", "blank", "-a", "-i", "/dev/null").fails(1)
    blank.run("vmcreate", "-n", "blank", "-a", "-m", 64).quiet()  # a template's clones don't mind


@pytest.mark.long
def test_a_clone_sees_its_larger_disk(tiny: Cloud) -> None:
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-o", "name=web", "-w", READY).ok()
    tiny.run("vmstop", "-g", "pf", "--kill").ok()
    tiny.run("vmcreate", "-n", "pf/web00", "-a", "-d", 20, "-m", 128).quiet()
    tiny.start("web00").ok()
    assert int(tiny.ssh("web00", "cat /sys/block/vda/size").ok().stdout) == 20 << 21
    seen = tiny.ssh("web00", "awk '/MemTotal/ { print $2 }' /proc/meminfo").ok().stdout
    assert 84 * 1024 < int(seen) <= 128 * 1024
