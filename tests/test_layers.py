"""Templates that have clones: what changes them goes to a layer, which counts only when the guest ended well."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from support import READY, Cloud, add_template, eventually, kill_hard, nothing_made

# A boot sector that copies itself to the next one, waits for a key, and switches the machine off (ACPI's PM1a control
# register; SeaBIOS puts it to 0x604 on a q35): a guest that writes, and shuts down by itself, in 32 MB and a second.
STUB = bytes.fromhex("31c0 8ed8 8ec0 b80103 bb007c b90200 b600 cd13 b400 cd16 ba0406 b80020 ef f4 ebfd")


def long(value: str) -> object:
    return pytest.param(value, marks=pytest.mark.long)


def add_stub(cloud: Cloud, name: str = "stub") -> Path:
    """A template of that guest, and a clone of it, kept/x/old00, that doesn't run; the template's disk."""
    image = cloud.home / f"{name}.raw"
    image.write_bytes(STUB.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    add_template(cloud, image, name, "--mem", 32, "--cpu", 1, "--init", "none")
    add_clone(cloud, "old", name)
    return cloud.base / "templates" / name / f"{name}_0.img"


def add_clone(cloud: Cloud, prefix: str, template: str = "stub") -> str:
    """A clone that has been switched off; its place in the tree."""
    done = cloud.run("vminstantiate", "-n", template, "-g", "kept", "-t", "x", "-o", f"name={prefix}").ok()
    cloud.run("vmstop", "-g", "kept", "--kill").ok()
    return f"kept/x/{done.lines[0]}"


@pytest.fixture
def stub(cloud: Cloud, vms: None) -> Cloud:
    add_stub(cloud)
    return cloud


def chain(disk: Path) -> list[str]:
    """The names of the files that a disk is made of, the newest first."""
    words = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", str(disk)]
    shown = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return [os.path.basename(each["filename"]) for each in shown]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def second_sector(disk: Path) -> bytes:
    """What a guest reads there."""
    out = disk.parent / "sectors.out"
    words = ["qemu-img", "dd", "-U", "-f", "qcow2", "-O", "raw", f"if={disk}", f"of={out}", "bs=512", "count=2"]
    subprocess.run(words, check=True, capture_output=True)
    try:
        return out.read_bytes()[512:]
    finally:
        out.unlink()


def disk_of(cloud: Cloud, place: str) -> Path:
    return cloud.base / cloud.conf(place)["vmDisk"]


def present(cloud: Cloud, name: str = "stub") -> str:
    return os.path.basename(cloud.conf(f"templates/{name}")["vmDisk"])


def files(cloud: Cloud, name: str = "stub") -> set[str]:
    """The template's disks and records."""
    return {path.name for path in cloud.folder(f"templates/{name}").iterdir() if ".img" in path.name}


def start_stub(cloud: Cloud) -> None:
    """The template runs, and its guest has written."""
    done = cloud.run("vm", "-n", "stub", "-G").ok()
    assert "stub has clones" in done.stderr
    shown = ("vmmanage", "-n", "templates/stub", "info blockstats")
    eventually(lambda: "wr_operations=1" in cloud.run(*shown).ok().stdout, "the guest has written")


def press_key(cloud: Cloud) -> None:
    """The guest switches itself off; nothing of nocloud's is there to see it."""
    pid = cloud.qemu("templates/stub")
    cloud.run("vmmanage", "-n", "templates/stub", "sendkey ret").ok()
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "the guest switched itself off")


def test_a_guest_that_shuts_down_by_itself_makes_the_layer_the_templates(stub: Cloud) -> None:
    base = stub.folder("templates/stub") / "stub_0.img"
    before = digest(base)
    start_stub(stub)
    assert present(stub) == "stub_0.img"
    during = add_clone(stub, "during")  # from the old disk, which nobody writes
    press_key(stub)
    after = add_clone(stub, "after")
    assert present(stub) == "stub.l1.img" and files(stub) == {"stub_0.img", "stub.l1.img"}
    layer = disk_of(stub, "templates/stub")
    assert layer.stat().st_mode & 0o222 == 0 and not (layer.parent / "stub.command").exists()
    assert chain(layer) == ["stub.l1.img", "stub_0.img"]
    shown = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", layer]))
    assert shown["backing-filename"] == "stub_0.img", "the tree can be moved"
    assert chain(disk_of(stub, after)) == ["after00_0.img", "stub.l1.img", "stub_0.img"]
    for old in ("kept/x/old00", during):
        assert chain(disk_of(stub, old))[1:] == ["stub_0.img"]
    assert second_sector(layer)[:2] == STUB[:2]
    assert digest(base) == before and second_sector(base) == bytes(512)
    row = stub.run("vmtemplate", "-L").ok().stdout
    assert "3 clones" in row
    stub.run("vmtemplate", "stub", "--delete").fails(1, "3 clones", "kept/x/old00", "kept/x/during00", after)


@pytest.mark.parametrize("how", ["kill", "button", "SIGKILL", long("SIGTERM"), long("quit")])
def test_any_other_end_leaves_the_template_as_it_was(stub: Cloud, how: str) -> None:
    conf = stub.conf("templates/stub")
    start_stub(stub)
    pid = stub.qemu("templates/stub")
    if how == "kill":
        done = stub.run("vmstop", "-n", "templates/stub", "--kill").ok()
    elif how == "button":
        done = stub.run("vmstop", "-n", "templates/stub", "--timeout", "1").ok()
    else:
        if how == "quit":
            stub.run("vmmanage", "-n", "templates/stub", "quit")
        else:
            os.kill(pid, getattr(signal, how))
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "qemu has ended")
        done = stub.run("vminstantiate", "-n", "stub", "-g", "kept", "-t", "x", "-o", "name=after").ok()
    assert "is lost" in done.stderr
    assert files(stub) == {"stub_0.img"}
    assert {key: stub.conf("templates/stub")[key] for key in conf} == conf
    assert second_sector(stub.folder("templates/stub") / "stub_0.img") == bytes(512)
    assert "is lost" not in stub.run("vmstop", "-g", "templates").quiet().stderr


def test_changed_twice(stub: Cloud) -> None:
    for number in (1, 2):
        start_stub(stub)
        press_key(stub)
        stub.run("vmstop", "-n", "templates/stub").quiet()  # settles it
        assert present(stub) == f"stub.l{number}.img"
    assert chain(disk_of(stub, "templates/stub")) == ["stub.l2.img", "stub.l1.img", "stub_0.img"]
    stub.run("vmstop", "-d", "-g", "kept").quiet()
    assert files(stub) == {"stub_0.img", "stub.l1.img", "stub.l2.img"}, "all of it is the template's"
    stub.run("vmtemplate", "stub", "--delete").quiet()
    assert not stub.folder("templates").exists()


def test_without_clones_its_own_disk_is_written_and_nothing_is_cloned_from_it(stub: Cloud) -> None:
    stub.run("vmstop", "-d", "-g", "kept").quiet()
    done = stub.run("vm", "-n", "stub", "-G").ok()
    assert "has clones" not in done.stderr and files(stub) == {"stub_0.img"}
    with nothing_made(stub):
        stub.run("vminstantiate", "-n", "stub", "-g", "kept").fails(1, "running")
    stub.run("vmstop", "-n", "templates/stub", "--kill").quiet()


def test_what_someone_still_stands_on_is_kept(stub: Cloud) -> None:
    """Disks that the template has left behind go with their last clone; one that can't be read keeps them all."""
    folder, conf = stub.folder("templates/stub"), stub.folder("templates/stub") / "stub.conf"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "stub_0.img", "stub.l1.img"], cwd=folder, check=True)
    conf.write_text(conf.read_text().replace("stub_0.img", "stub.l1.img"))
    new = add_clone(stub, "new")
    assert files(stub) == {"stub_0.img", "stub.l1.img"}
    other = stub.folder(new) / "new00.conf"
    other.rename(stub.folder(new) / "hidden")
    other.write_text("vmMem=$(reboot)\n")
    stub.run("vmstop", "-d", "-n", "kept/old00").ok()
    assert files(stub) == {"stub_0.img", "stub.l1.img"}
    (stub.folder(new) / "hidden").rename(other)
    stub.run("vmstop", "-g", "templates").quiet()
    assert files(stub) == {"stub.l1.img"}
    assert chain(disk_of(stub, new)) == ["new00_0.img", "stub.l1.img"]


@pytest.mark.parametrize("form", ["own", long("absolute")])
def test_the_conf_keeps_the_form_it_has(stub: Cloud, form: str) -> None:
    folder = stub.folder("templates/stub")
    conf = folder / "stub.conf"
    name = {"own": "stub_0.img", "absolute": str(folder / "stub_0.img")}[form]
    conf.write_text(conf.read_text().replace("templates/stub/stub_0.img", name))
    start_stub(stub)
    press_key(stub)
    stub.run("vmstop", "-n", "templates/stub").quiet()
    assert stub.conf("templates/stub")["vmDisk"] == name.replace("stub_0.img", "stub.l1.img")


def test_a_clone_runs_while_its_template_is_changed(tiny: Cloud) -> None:
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY).ok()
    base = tiny.folder("templates/tiny") / "tiny_0.img"
    before = digest(base)
    done = tiny.run("vm", "-n", "tiny", "echo changed > /root/change; hostname")
    assert done.ok().stdout == "tiny\n" and "tiny has clones" in done.stderr
    tiny.run("vmstop", "-n", "templates/tiny").quiet()
    assert present(tiny, "tiny") == "tiny.l1.img"
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY).ok()
    assert tiny.ssh("web01", "cat /root/change; hostname").ok().stdout == "changed\nweb01\n"
    assert tiny.ssh("web00", "ls /root/change; hostname").stdout == "web00\n"
    assert digest(base) == before


@pytest.mark.long
def test_killed_at_any_instant(stub: Cloud) -> None:
    """Twenty times the command that changes the template, or its qemu, is killed; each time it is the old one."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    instants = random.Random(seed)
    before = digest(stub.folder("templates/stub") / "stub_0.img")
    for _ in range(20):
        child = stub.spawn("vm", "-n", "stub", "-G")
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(instants.uniform(0.05, 1.5))
        child.kill()
        child.communicate()
        state = stub.run("vmrunning", "-a", "-g", "templates").ok().stdout.split()[2]
        if state == "running":
            kill_hard(stub.qemu("templates/stub"))
        stub.run("vmstop", "-n", "templates/stub").ok()
        assert files(stub) == {"stub_0.img"} and present(stub) == "stub_0.img"
        assert digest(stub.folder("templates/stub") / "stub_0.img") == before
    start_stub(stub)
    press_key(stub)
    stub.run("vmstop", "-n", "templates/stub").quiet()
    assert present(stub) == "stub.l1.img"
