"""Trees that the bash tools made, and VMs that they started and that still run; with confs and qemus as theirs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tinyguest
from support import Cloud, add_blank, bash_values, eventually, is_alive, kill_hard, nothing_made, processes_with

MAC = "52:54:00:12:34:ab"
ADDRESS = "192.168.1.77"
CONF = """\
#!/bin/bash
vmName="{name}"
vmMem=32
vmCpu=1
vmDisk="{disk}"
vmExtraDisk=""
"""


def add(cloud: Cloud, place: str, disk: str = "", *, conf: str = CONF, format: str = "qcow2") -> Path:
    """A VM with an empty disk as bash made them; its folder.  `disk`: how its conf names that."""
    folder = cloud.folder(place)
    folder.mkdir(parents=True)
    image = folder / f"{folder.name}_0.img"
    cloud.execute(["qemu-img", "create", "-q", "-f", format, image, "8M"]).ok()
    disk = (disk or "{own}").format(own=image.name, tree=image.relative_to(cloud.base), absolute=image)
    (folder / f"{folder.name}.conf").write_text(conf.format(name=folder.name, disk=disk))
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def bash_runs(cloud: Cloud, folder: Path, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """A qemu as the bash tools start it, in `folder`, that has locked its disk; it ends here at the latest."""
    argv = ["qemu-system-x86_64", "-m", "32", "-display", "none", "-net", f"nic,macaddr={MAC}", *map(str, words)]
    child = subprocess.Popen(argv, cwd=folder, env=cloud.env, stdin=subprocess.DEVNULL)
    try:
        if "-daemonize" in argv:
            assert child.wait(30) == 0
        else:
            disks = set(cloud.base.rglob("*_0.img"))
            eventually(lambda: disks & open_files(child.pid), "a disk of the tree is open", 30)
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(10)
        for pid, line in processes_with(str(cloud.home)).items():
            if "qemu-system" in line:
                os.kill(pid, signal.SIGKILL)


def open_files(pid: int) -> set[Path]:
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.add(Path(os.readlink(f"/proc/{pid}/fd/{fd}")))
        except FileNotFoundError:
            continue
    return found


def holder(cloud: Cloud) -> int:
    """The process that keeps the private network's namespaces."""
    (found,) = (pid for pid, words in cloud.processes().items() if " net follow " in words)
    return found


@pytest.fixture
def tree(cloud: Cloud, vms: None) -> Cloud:
    """pf/web/web00 and its namesake other/web/web00, and a lease for the MAC that bash's qemu has."""
    for group in ("pf", "other"):
        add(cloud, f"{group}/web/web00")
    leases = cloud.home / "leases"
    leases.write_text(f"1700000000 {MAC} {ADDRESS} web00 *\n")
    cloud.env |= {"NOCLOUD_bridgeLeases": str(leases), "NOCLOUD_vmStopTimeout": "1"}
    return cloud


# How it names its disk (and where it was started), how its monitor is reached.
WAYS = {
    "telnet": ("{base}", ["-hda", "{folder}/web00_0.img", "-monitor", "telnet:127.0.0.1:{port},server,nowait"]),
    "unix": ("{base}", ["-drive", "file=pf/web/web00/web00_0.img,if=virtio", "-monitor", "unix:m.sock,server,nowait"]),
    "left its folder": (
        "{folder}",
        ["-drive", "file=web00_0.img", "-daemonize", "-monitor", "telnet:localhost:{port},server=on,wait=off"],
    ),
    "blockdev": (
        "/",
        [
            *("-blockdev", "driver=qcow2,node-name=d,file.driver=file,file.filename={folder}/web00_0.img"),
            *("-device", "virtio-blk-pci,drive=d", "--monitor", "unix:{folder}/m.sock,server=on,wait=off"),
        ],
    ),
    "a pidfile": ("{base}", ["pf/web/web00/web00_0.img", "-pidfile", "{folder}/web00.pid", "-monitor", "none"]),
    "no monitor": ("{base}", ["-hda", "{link}", "-monitor", "none"]),
}


# One way of each kind is quick; what they differ in else is told by the long run.
QUICK = ("telnet", "left its folder", "no monitor")


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.long) for way in WAYS])
def test_a_vm_that_bash_started(tree: Cloud, way: str) -> None:
    """Listed with its address, not started twice, managed and stopped over its own monitor; its namesake is not."""
    folder = tree.folder("pf/web/web00")
    (link := tree.home / "link.img").symlink_to(folder / "web00_0.img")
    place, words = WAYS[way]
    values = {"base": tree.base, "folder": folder, "port": free_port(), "link": link}
    with bash_runs(tree, Path(place.format(**values)), *(word.format(**values) for word in words)):
        row = f"web00 pf/web {ADDRESS}"
        assert tree.run("vmrunning").ok().lines == tree.run("vminventory").ok().lines == [row]
        assert sorted(line.split()[1:3] for line in tree.run("vmrunning", "-a").ok().lines) == [
            ["other/web", "stopped"],
            ["pf/web", "running"],
        ]
        known = json.loads(tree.run("vminventory", "--list").ok().stdout)
        assert known["pf_web"] == {"hosts": [ADDRESS]} and "other" not in known
        assert known["_meta"]["hostvars"][ADDRESS]["nocloud_name"] == "web00"
        with nothing_made(tree):
            tree.start("pf/web00").fails(1, "web00", "running")
            tree.run("vmcreate", "-a", "-n", "pf/web00", "-m", 64).fails(1, "running")
            tree.run("vmconsole", "-s", "-n", "pf/web00").fails(1, "web00", "serial console", "vmmanage")
            tree.run("vmconsole", "--screenshot", "x", "-n", "pf/web00").fails(1, "web00", "screen", "vmmanage")
            tree.run("vmlog", "-n", "pf/web00").fails(1, "web00", "no console.log")
            (vm,) = json.loads(tree.run("vmrunning", "--json", "-g", "pf").ok().stdout)
            assert (vm["state"], vm["address"]) == ("running", ADDRESS) and vm["pid"] in tree.processes()
        if way in ("a pidfile", "no monitor"):
            tree.run("vmmanage", "-n", "pf/web00", "info status").fails(1, "web00", "no monitor")
        else:
            assert tree.run("vmmanage", "-n", "pf/web00", "info status").ok().stdout == "VM status: running\n"
            assert "web00_0.img" in tree.run("vmmanage", "-n", "pf/web00", "info", "block").ok().stdout
            tree.run("vmmanage", "-n", "pf/web00", "frobnicate").fails(1, "unknown command")
        assert "switched off: web00" in tree.run("vmstop", "-g", "pf").ok().stderr
        assert tree.run("vmrunning").ok().stdout == "" and (folder / "web00_0.img").exists()
        assert not [line for line in tree.processes().values() if "qemu-system" in line]


def test_beside_vms_of_the_private_network(tree: Cloud) -> None:
    """A VM that bash started is on the host's bridge: the private network ends though it runs.  -d destroys it."""
    add_blank(tree)
    with bash_runs(tree, tree.base, "-hda", "pf/web/web00/web00_0.img", "-monitor", "none") as qemu:
        tree.run("vminstantiate", "-n", "blank", "-g", "new", "-o", "name=a").ok()
        assert "web00" not in tree.run("net", "status").ok().stdout
        kill_hard(holder(tree))  # who brings the network back looks for VMs that are still on it
        assert len(tree.run("vmrunning").ok().lines) == 2
        tree.run("vmstop", "-d", "-g", "new").ok()
        assert not (tree.base / ".net/holder.pid").exists() and is_alive(qemu.pid)
        tree.run("vmstop", "-d", "-g", "pf").quiet()
        assert not is_alive(qemu.pid) and not tree.folder("pf").exists()


@pytest.mark.long
def test_vmrun_takes_it_over(tree: Cloud) -> None:
    """As it takes over what runs: without a restart, until it destroys or keeps it."""
    with bash_runs(tree, tree.base, "-hda", "pf/web/web00/web00_0.img", "-monitor", "none") as qemu:
        told = tree.run("vmrun", "-r", "pf", "--background", env={"NOCLOUD_vmWaitTimeout": "1"})
        assert told.status == 124 and f"web00 has IP {ADDRESS}" in told.stdout, told
        assert is_alive(qemu.pid)
        tree.run("vmrun", "-s", "pf").ok()
        assert not is_alive(qemu.pid) and tree.folder("pf/web/web00").exists()


def test_a_template_that_bash_runs_is_not_cloned(cloud: Cloud, vms: None) -> None:
    folder = add(cloud, "templates/old", "{tree}")
    with bash_runs(cloud, folder, "-hda", "old_0.img", "-monitor", "none"):
        with nothing_made(cloud):
            cloud.run("vminstantiate", "-n", "old", "-g", "pf").fails(1, "old", "running")
            cloud.run("vmtemplate", "--delete", "old").fails(1, "running")
        cloud.run("vmstop", "-n", "templates/old", "--kill").quiet()
    assert cloud.run("vminstantiate", "-n", "old", "-g", "pf", "-o", "name=a").ok().lines == ["a00"]


def test_words_that_only_look_alike(tree: Cloud) -> None:
    """The disk counts, not its name: neither a file of that name elsewhere, nor a disk that others stand on."""
    other = tree.home / "web00_0.img"
    tree.execute(["qemu-img", "create", "-q", "-f", "qcow2", other, "8M"]).ok()
    base = tree.folder("pf/web/web00/web00_0.img")
    over = tree.home / "over.img"
    tree.execute(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, over]).ok()
    words = ("-drive", "file=web00_0.img", "-hdc", over, "-name", "web00_0.img")
    with bash_runs(tree, tree.home, *words, "-daemonize"):
        assert tree.run("vmrunning").ok().stdout == ""
    other.with_name("qemu-nbd").symlink_to(shutil.which("tail") or "")
    with base.open("r+b") as file:  # a tool of qemu's that works on the disk
        argv = [str(other.with_name("qemu-nbd")), "-qfn0", str(over), str(base)]
        tool = subprocess.Popen(argv, stdin=file, stdout=subprocess.DEVNULL, env=tree.env)
        try:
            eventually(lambda: base in open_files(tool.pid), "it has the disk open")
            assert tree.run("vmrunning").ok().stdout == "" and tool.poll() is None
        finally:
            tool.kill()
            tool.wait()


def test_our_own_without_its_pidfile(blank: Cloud) -> None:
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
    folder = blank.folder("pf/default/web00")
    row = blank.run("vmrunning").ok().lines
    (folder / "web00.pid").unlink()
    assert blank.run("vmrunning").ok().lines == row and row[0].endswith(blank.conf("pf/default/web00")["vmAddress"])
    blank.start("web00").fails(1, "running")
    blank.run("vmstop", "-n", "web00", "--kill").quiet()
    assert blank.run("vmrunning").ok().stdout == ""


# Formats of disks ####################################################################################


def driver(cloud: Cloud, vm: str) -> list[str]:
    """The drivers of a VM's disks as its qemu was told."""
    text = next(cloud.folder(vm).glob("*.command")).read_text()
    return re.findall(r"driver=(\w+),node-name=disk", text)


def test_a_format_is_found_out_once(cloud: Cloud, vms: None) -> None:
    """A guest that writes the header of a qcow2 image into its raw disk reads no file of the host."""
    folder = add(cloud, "pf/web/web00", format="raw")
    cloud.start("web00").ok()
    cloud.run("vmstop", "-n", "web00", "--kill").ok()
    assert driver(cloud, "pf/web/web00") == ["raw"] and cloud.conf("pf/web/web00")["vmDiskFormat"] == "raw"
    disk = folder / "web00_0.img"
    evil = cloud.home / "evil"
    cloud.execute(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", evil, "8M"]).ok()
    with disk.open("r+b") as file:
        file.write(evil.read_bytes()[: 1 << 16])
    cloud.run("vmtemplate", "thief", "--from", "pf/web/web00", "--layer", "--no-clean").fails(1, "stands on no other")
    cloud.start("web00").ok()
    assert driver(cloud, "pf/web/web00") == ["raw"]
    assert "/etc/passwd" not in cloud.run("vmmanage", "-n", "web00", "info", "block").ok().stdout
    cloud.run("vmstop", "-n", "web00", "--kill").ok()
    cloud.run("vmcreate", "-a", "-n", "pf/web00", "-d", 1).quiet()
    assert disk.stat().st_size == 1 << 30


def test_a_first_look_out_of_the_tree(cloud: Cloud, vms: None) -> None:
    """Whether guest or user made that header isn't known, so the user is asked; inside the tree nobody is."""
    folder = add(cloud, "pf/web/web00")
    outside = cloud.home / "outside.img"
    cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", outside, "8M"]).ok()
    disk = folder / "web00_0.img"
    cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", outside, disk]).ok()
    cloud.start("web00").fails(1, "web00", str(outside), "vmDiskFormat=qcow2")
    with (folder / "web00.conf").open("a") as conf:
        conf.write("vmDiskFormat=qcow2\n")
    cloud.start("web00").ok()
    cloud.run("vmstop", "-n", "web00", "--kill").ok()
    with (folder / "web00.conf").open("a") as conf:
        conf.write("vmDiskFormat=qcow2,raw\n")
    cloud.start("web00").fails(2, "web00", "2 formats for 1 disk")
    with (folder / "web00.conf").open("a") as conf:
        conf.write("vmDiskFormat=vmdk\n")
    cloud.start("web00").fails(2, "vmDiskFormat=vmdk", "qcow2 or raw")


def test_disks_added_by_hand(blank: Cloud) -> None:
    """What is recorded stays, what isn't is looked at."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web;dsk=1").ok()
    blank.run("vmstop", "-g", "pf", "--kill").ok()
    assert blank.conf("pf/default/web00")["vmDiskFormat"] == "qcow2,qcow2"
    assert blank.conf("templates/blank")["vmDiskFormat"] == "qcow2"
    folder = blank.folder("pf/default/web00")
    (folder / "more.raw").write_bytes(bytes(1 << 20))
    conf = folder / "web00.conf"
    conf.write_text(conf.read_text().replace("web00_1.img", "web00_1.img,more.raw"))
    blank.start("web00").ok()
    assert driver(blank, "pf/default/web00") == ["qcow2", "qcow2", "raw"]
    assert blank.conf("pf/default/web00")["vmDiskFormat"] == "qcow2,qcow2,raw"


def test_a_raw_template_is_cloned_as_raw(cloud: Cloud, vms: None) -> None:
    disk = add(cloud, "templates/old", "{tree}", format="raw") / "old_0.img"
    with nothing_made(cloud):
        cloud.run("vminstantiate", "-n", "old", "-g", "pf").fails(1, "old", "not a qcow2 or raw image")
    with disk.open("r+b") as file:
        file.seek(510)
        file.write(b"\x55\xaa")
    disk.parent.rename(disk.parent.with_name("old+er one"))
    for name in ("old_0.img", "old.conf"):  # a name that vmtemplate would refuse
        path = disk.parent.with_name("old+er one") / name
        path.rename(path.with_name(name.replace("old", "old+er one")))
    conf = cloud.folder("templates/old+er one/old+er one.conf")
    conf.write_text(conf.read_text().replace("templates/old/old_0", "templates/old+er one/old+er one_0"))
    cloud.run("vminstantiate", "-n", "old+er one", "-g", "pf", "-o", "name=web").ok()
    assert cloud.conf("templates/old+er one")["vmDiskFormat"] == "raw"
    image = cloud.folder("pf/default/web00") / "web00_0.img"
    info = json.loads(cloud.execute(["qemu-img", "info", "-U", "--output=json", image]).ok().stdout)
    assert info["backing-filename-format"] == "raw" and info["virtual-size"] == 8 << 20
    assert "1 clone" in cloud.run("vmtemplate", "--list").ok().stdout


# Whole trees #########################################################################################


@pytest.fixture
def inherited(cloud: Cloud, guest_cache: Path, vms: None) -> Cloud:
    """A tree as the bash tools left it: a template whose guest knows the card `ens3` only, and three stopped clones,
    one for each form of vmDisk that there has been; no UUIDs, no machine type, odd names."""
    key = cloud.home / ".ssh/id_ed25519"
    key.parent.mkdir(0o700)
    cloud.execute(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key]).ok()
    public = key.with_suffix(".pub").read_text()
    template = cloud.folder("templates/archlinux")
    template.mkdir(parents=True)
    image = tinyguest.build(guest_cache, public, ifname="ens3", reads="")
    cloud.execute(["qemu-img", "convert", "-O", "raw", image, template / "archlinux_0.img"]).ok()
    (template / "archlinux.conf").write_text(CONF.format(name="archlinux", disk="templates/archlinux/archlinux_0.img"))
    for place, disk in (("pf/web/web_1", "{tree}"), ("pf/web/web.two", "{own}"), ("pf/db/Db three", "{absolute}")):
        folder = add(cloud, place, disk)
        over, base = folder / f"{folder.name}_0.img", template / "archlinux_0.img"
        cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, over]).ok()
        if folder.name == "Db three":  # as qemu-img made them before version 6.1: the backing file's format isn't named
            header = over.read_bytes()[: 1 << 16]
            with over.open("r+b") as file:
                file.write(header.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78", 1))
            assert "backing file format" not in cloud.execute(["qemu-img", "info", over]).ok().stdout
        conf = folder / f"{folder.name}.conf"
        conf.write_text(conf.read_text().replace("vmMem=32", "vmMem=96"))
    return cloud


@pytest.mark.long
def test_a_tree_of_the_bash_tools_runs_as_it_is(inherited: Cloud) -> None:
    """All with one vmrun -r: the card at slot 3 of a `pc`, so ens3 comes up; confs keep their form, for bash too."""
    cloud = inherited
    places = ["pf/web/web_1", "pf/web/web.two", "pf/db/Db three"]
    before = {place: cloud.conf(place) for place in places}
    assert [line.split(" pf/")[0] for line in cloud.run("vmrunning", "-a", "-g", "pf").ok().lines] == [
        "Db three",
        "web.two",
        "web_1",
    ]
    told = cloud.run("vmrun", "-r", "pf", "--background", env={"NOCLOUD_vmWaitTimeout": "120"}).ok()
    for place in places:
        name, folder = place.rsplit("/", 1)[1], cloud.folder(place)
        assert any(line.endswith(f" {name} is ready") for line in told.lines), told
        conf = bash_values(folder / f"{name}.conf")
        assert before[place].items() <= conf.items()  # vmDisk too
        assert conf["vmUuid"] and "vmMachine" not in conf and conf["vmDiskFormat"] == "qcow2"
        words = (folder / f"{name}.command").read_text()
        assert "-machine pc\n" in words.replace(" \\", "") and "addr=0x3," in words
        seen = cloud.ssh(place, "cat /sys/class/net/ens3/address; hostname").ok().lines
        assert seen == [conf["vmMac"], re.sub("[. ]", "-", name)]
    cloud.run("vmrun", "-s", "pf").quiet()
    kept = {place: cloud.conf(place) for place in places}
    assert cloud.run(
        "vminstantiate", "-n", "archlinux", "-g", "new", "-o", "name=web;mem=96", "-w", 120
    ).ok().lines == ["web00"]
    assert cloud.ssh("web00", "hostname").ok().stdout == "web00\n"
    assert {place: cloud.conf(place) for place in places} == kept
    cloud.run("vmstop", "-d", "-g", "pf").quiet()
    assert not cloud.folder("pf").exists() and cloud.folder("templates/archlinux/archlinux_0.img").exists()


@pytest.mark.long
def test_a_guest_that_bash_started_shuts_down_properly(inherited: Cloud) -> None:
    cloud = inherited
    folder, port = cloud.folder("pf/web/web_1"), free_port()
    words = ("-drive", f"file={folder}/web_1_0.img,if=virtio", "-monitor", f"telnet:127.0.0.1:{port},server,nowait")
    serial = cloud.home / "serial"
    with bash_runs(cloud, folder, "-m", 96, "-nographic", "-serial", f"file:{serial}", *words):
        eventually(lambda: serial.exists() and "ready after" in serial.read_text(), "the guest is up", 90)
        done = cloud.run("vmstop", "-g", "pf", "--timeout", 60).quiet()
        assert done.seconds < 50 and "tinyguest: poweroff" in serial.read_text()
