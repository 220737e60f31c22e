"""Templates that have clones: what changes them goes to a layer, which counts only when the guest ended well."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import READY, Cloud, add_template, eventually, kill_hard, nothing_made, root_offset

import nocloud

# A boot sector that copies itself to the next one, waits for a key, and switches the machine off (ACPI's PM1a control
# register; SeaBIOS puts it to 0x604 on a q35): a guest that writes, and shuts down by itself, in 32 MB and a second.
STUB = bytes.fromhex("31c0 8ed8 8ec0 b80103 bb007c b90200 b600 cd13 b400 cd16 ba0406 b80020 ef f4 ebfd")


def long(value: str) -> object:
    return pytest.param(value, marks=pytest.mark.long)


def stub_image(cloud: Cloud) -> Path:
    image = cloud.home / "stub.raw"
    image.write_bytes(STUB.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
    return image


def add_stub(cloud: Cloud) -> None:
    """The template `stub` of that guest, and a clone of it, kept/x/old00, that doesn't run."""
    add_template(cloud, stub_image(cloud), "stub", "--mem", 32, "--cpu", 1, "--init", "none")
    add_clone(cloud, "old")


def add_clone(cloud: Cloud, prefix: str, template: str = "stub") -> str:
    """A clone that has been switched off as soon as it ran; its place in the tree."""
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


def start_stub(cloud: Cloud, why: str = "has clones") -> None:
    """The template runs, on a layer, and its guest has written."""
    done = cloud.run("vm", "-n", "stub", "-G").ok()
    assert f"stub {why}: what changes becomes a new layer" in done.stderr
    shown = ("vmmanage", "-n", "templates/stub", "info blockstats")
    eventually(lambda: "wr_operations=1" in cloud.run(*shown).ok().stdout, "the guest has written")


def wait_ended(pid: int, seconds: float = 30) -> None:
    eventually(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} has ended", seconds)


def press_key(cloud: Cloud) -> None:
    """The guest switches itself off; nothing of nocloud's is there to see it."""
    pid = cloud.qemu("templates/stub")
    cloud.run("vmmanage", "-n", "templates/stub", "sendkey ret").ok()
    wait_ended(pid)


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


@pytest.mark.parametrize("how", ["kill", long("button"), "SIGKILL", long("SIGTERM"), long("quit")])
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
        wait_ended(pid)
        done = stub.run("vminstantiate", "-n", "stub", "-g", "kept", "-t", "x", "-o", "name=after").ok()
    assert "is lost" in done.stderr
    assert files(stub) == {"stub_0.img"}
    assert {key: stub.conf("templates/stub")[key] for key in conf} == conf
    assert second_sector(stub.folder("templates/stub") / "stub_0.img") == bytes(512)
    assert "is lost" not in stub.run("vmstop", "-g", "templates").quiet().stderr


@pytest.mark.long
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


@pytest.mark.parametrize("form", [long("own"), long("absolute")])
def test_the_conf_keeps_the_form_it_has(stub: Cloud, form: str) -> None:
    folder = stub.folder("templates/stub")
    conf = folder / "stub.conf"
    name = {"own": "stub_0.img", "absolute": str(folder / "stub_0.img")}[form]
    conf.write_text(conf.read_text().replace("templates/stub/stub_0.img", name))
    start_stub(stub)
    press_key(stub)
    stub.run("vmstop", "-n", "templates/stub").quiet()
    assert stub.conf("templates/stub")["vmDisk"] == name.replace("stub_0.img", "stub.l1.img")


# Upgrades ############################################################################################################

# The tiny guest reads this file at each boot: it gets a package manager, and says that it is a distribution.
PRETEND = r"""
mkdir -p /etc/fake
cat >/etc/fake/apk <<'END'
#!/bin/sh
printf 'apk %s\r\n' "$*"
[ "$1" = upgrade ] || exit 0
[ ! -e /etc/slow ] || sleep 600
[ ! -e /etc/fails ] || exit 7
echo "$(cat /etc/upgraded)x" >/etc/upgraded
END
chmod 755 /etc/fake/apk
echo 'ln -sf /etc/fake/apk /bin/apk' >>/etc/tinyguest.conf
printf 'ID=alpine\nPRETTY_NAME="Alpine Linux, more or less"\n' >/etc/os-release
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
echo secret >/root/.ash_history
"""


@pytest.mark.long
def test_changed_and_upgraded(tiny: Cloud) -> None:
    disk, base = disk_of(tiny, add_clone(tiny, "old", "tiny")), disk_of(tiny, "templates/tiny")
    before = digest(disk), digest(base)
    done = tiny.run("vm", "-n", "tiny", PRETEND + "hostname")
    assert done.ok().stdout == "tiny\n" and "tiny has clones" in done.stderr
    tiny.run("vmstop", "-n", "templates/tiny").quiet()
    assert present(tiny, "tiny") == "tiny.l1.img"
    done = tiny.run("vmupgrade", "tiny").ok()
    assert done.stdout == ""
    assert "Alpine Linux, more or less" in done.stderr and "apk update\napk upgrade\n" in done.stderr
    assert files(tiny, "tiny") == {"tiny_0.img", "tiny.l1.img", "tiny.l2.img"}
    assert chain(disk_of(tiny, "templates/tiny")) == ["tiny.l2.img", "tiny.l1.img", "tiny_0.img"]
    assert (digest(disk), digest(base)) == before
    tiny.run("vmstop", "-d", "-g", "kept").quiet()
    assert not tiny.processes()


@pytest.mark.long
def test_a_clone_runs_while_its_template_is_changed_and_upgraded(tiny: Cloud) -> None:
    new = ("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", "name=web", "-w", READY)
    tiny.run(*new).ok()
    base = tiny.folder("templates/tiny") / "tiny_0.img"
    before = digest(base)
    done = tiny.run("vm", "-n", "tiny", PRETEND + "hostname")
    assert done.ok().stdout == "tiny\n" and "tiny has clones" in done.stderr
    tiny.run("vmstop", "-n", "templates/tiny").quiet()
    assert present(tiny, "tiny") == "tiny.l1.img"
    tiny.run("vmupgrade", "tiny").ok()
    assert present(tiny, "tiny") == "tiny.l2.img"
    tiny.run(*new).ok()
    shown = tiny.ssh("web01", "cat /etc/upgraded; hostname; wc -c </etc/machine-id; ls -a /root").ok().stdout.split()
    assert shown[:3] == ["x", "web01", "0"] and ".ash_history" not in shown
    assert tiny.ssh("web00", "ls /etc/upgraded; hostname").stdout == "web00\n"
    assert digest(base) == before


APT = ["apt-get update", "apt-get dist-upgrade", "apt-get autoremove", "apt-get clean", "rm"]
DNF = ["dnf upgrade", "dnf all"]
SYSTEMS = {
    "debian": ('ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n', "", APT),
    "mint": ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "", APT),
    "a failure": ("ID=ubuntu\nID_LIKE=debian\n", "apt-get\\ *dist-upgrade) exit 100", APT[:2]),
    "no archive": ("ID=debian\n", "apt-get\\ *update) exit 100", APT[:1]),
    "arch": ("ID=arch\n", "", ["pacman archlinux-keyring", "pacman --noconfirm", "rm"]),
    "fedora": ("NAME='Fedora Linux'\nID=fedora\n", "", DNF),
    "alma": ('ID="almalinux"\nID_LIKE="rhel centos fedora"\n', "", DNF),
    "leap": (
        'ID="opensuse-leap"\nID_LIKE="suse opensuse"\n',
        "zypper\\ *update*) exit 102",
        ["zypper refresh", "zypper --auto-agree-with-licenses", "zypper --all"],
    ),
    "zypper is new": (
        'ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n',
        "zypper\\ *dup*) [ -e again ] || { : >again; exit 103; }",
        ["zypper refresh", "zypper --auto-agree-with-licenses", "zypper --auto-agree-with-licenses", "zypper --all"],
    ),
    "alpine": ("ID=alpine\n", "", ["apk update", "apk upgrade", "rm"]),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_system_is_upgraded_in_its_way(tmp_path: Path, name: str) -> None:
    """The script is run by a real shell that has nothing but stand-ins, which write down how they were called."""
    text, answer, wanted = SYSTEMS[name]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").symlink_to("/bin/sh")
    stand_in = f'#!/bin/sh\necho "${{0##*/}} $*" >>called\ncase "${{0##*/}} $*" in {answer or "x) :"};; esac\n'
    for program in ("apt-get", "pacman", "dnf", "zypper", "apk", "rm"):
        (tmp_path / "bin" / program).write_text(stand_in)
        (tmp_path / "bin" / program).chmod(0o755)
    (tmp_path / "bin/id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "bin/sudo").write_text('#!/bin/sh\n[ "$1" = -n ] && shift && exec "$@"\n')
    for program in ("id", "sudo"):
        (tmp_path / "bin" / program).chmod(0o755)
    script = nocloud.upgrade_script("x", nocloud.parse_os_release(text))
    done = subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, env={"PATH": str(tmp_path / "bin")}, check=False)
    assert done.returncode == (100 if "exit 100" in answer else 0)
    called = (tmp_path / "called").read_text().splitlines()
    assert [" ".join([line.split()[0], line.split()[-1]]) if line[:2] != "rm" else "rm" for line in called] == wanted


@pytest.mark.parametrize("text", ["", "ID=slackware\n", "ID=\nID_LIKE=\n", "ID='debian; reboot'\n"])
def test_a_system_that_is_not_known(text: str) -> None:
    with pytest.raises(nocloud.Error, match="doesn't know how to upgrade"):
        nocloud.upgrade_script("x", nocloud.parse_os_release(text))


@pytest.fixture(scope="module")
def alpine(shared: Cloud) -> Cloud:
    """A cloud whose template `tiny` can be upgraded; it has no clones."""
    shared.run("vm", "-n", "tiny", PRETEND).ok()
    shared.run("vmstop", "-n", "templates/tiny").quiet()
    return shared


@pytest.mark.long
def test_without_clones_an_upgrade_leaves_one_disk(alpine: Cloud) -> None:
    for number, found in ((2, "x"), (4, "xx")):
        alpine.run("vmupgrade", "tiny").ok()
        assert present(alpine, "tiny") == f"tiny.l{number}.img" and files(alpine, "tiny") == {f"tiny.l{number}.img"}
        assert chain(disk_of(alpine, "templates/tiny")) == [f"tiny.l{number}.img"]
        assert alpine.run("vm", "-n", "tiny", "cat /etc/upgraded; hostname").ok().stdout == f"{found}\ntiny\n"
        alpine.run("vmstop", "-n", "templates/tiny").quiet()


@contextlib.contextmanager
def unchanged(cloud: Cloud) -> Iterator[None]:
    """What goes on meanwhile leaves the template tiny as it is, and nothing running."""
    conf, disk, kept = cloud.conf("templates/tiny"), disk_of(cloud, "templates/tiny"), files(cloud, "tiny")
    before = digest(disk)
    yield
    assert (disk_of(cloud, "templates/tiny"), files(cloud, "tiny"), digest(disk)) == (disk, kept, before)
    assert {key: cloud.conf("templates/tiny")[key] for key in conf} == conf
    eventually(lambda: not cloud.processes(), "nothing runs any more")


@pytest.mark.long
def test_an_unknown_distribution(tiny: Cloud) -> None:
    with unchanged(tiny):
        done = tiny.run("vmupgrade", "tiny")
        assert done.status == 1 and "Tiny guest: nocloud doesn't know" in done.stderr, repr(done)
    assert files(tiny, "tiny") == {"tiny_0.img"}


@pytest.mark.long
def test_an_upgrade_that_fails(alpine: Cloud) -> None:
    change(alpine, "touch /etc/fails")
    with unchanged(alpine):
        done = alpine.run("vmupgrade", "tiny")
        assert done.status == 1 and "exit status 7" in done.stderr and "as it was" in done.stderr, repr(done)
    change(alpine, "rm /etc/fails")


def change(cloud: Cloud, script: str) -> None:
    cloud.run("vm", "-n", "tiny", script).ok()
    cloud.run("vmstop", "-n", "templates/tiny").quiet()


@pytest.mark.long
def test_an_upgrade_that_is_broken_off(alpine: Cloud) -> None:
    """By the user, a time limit, SIGKILL, another shell's vmstop, the guest's death: it is the old template."""
    change(alpine, "touch /etc/slow")
    with unchanged(alpine):
        done = alpine.run("vmupgrade", "tiny", "--timeout", 3)
        assert done.status == 124 and "no end of the upgrade after 3 s; the template is as it was" in done.stderr, repr(
            done
        )
    for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        with unchanged(alpine):
            child, pid = upgrading(alpine), alpine.qemu("templates/tiny")
            alpine.run("vmupgrade", "tiny").fails(1, "running")
            child.send_signal(number)
            assert child.wait(60) == status
            if status == -9:
                wait_ended(pid)
                alpine.run("vmstop", "-n", "templates/tiny").ok()
    for how in ("stop", "kill"):
        with unchanged(alpine):
            child = upgrading(alpine)
            if how == "stop":
                alpine.run("vmstop", "-n", "templates/tiny").ok()
            else:
                kill_hard(alpine.qemu("templates/tiny"))
            assert child.wait(60) == 1
            assert child.stderr and "as it was" in child.stderr.read()
    change(alpine, "rm /etc/slow")


def upgrading(cloud: Cloud) -> subprocess.Popen[str]:
    """A vmupgrade that is in the middle of it; what the package manager says has come already."""
    child = cloud.spawn("vmupgrade", "tiny")
    assert child.stderr
    for line in child.stderr:
        if line == "apk upgrade\n":
            return child
    raise AssertionError("it ended before")


def package(folder: Path, version: int) -> bytes:
    """A Debian package that consists of its version."""
    tree = folder / f"probe-{version}"
    (tree / "DEBIAN").mkdir(parents=True)
    control = (
        f"Package: probe\nVersion: {version}\nArchitecture: all\nMaintainer: me <me@example.org>\nDescription: probe\n"
    )
    (tree / "DEBIAN/control").write_text(control)
    target = folder / f"probe_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, target], check=True, capture_output=True)
    return target.read_bytes()


def repository(folder: Path) -> str:
    """A script for a Debian guest: it has the package probe 1, and knows an archive, in a folder, that has 2."""
    old, new = package(folder, 1), package(folder, 2)
    index = (folder / "probe-2/DEBIAN/control").read_text()
    index += f"Filename: ./probe.deb\nSize: {len(new)}\nSHA256: {hashlib.sha256(new).hexdigest()}\n"
    lines = ["set -e", "mkdir -p /opt/repository", "cd /opt/repository", ": >/etc/apt/sources.list"]
    for name, data in (("old.deb", old), ("probe.deb", new), ("Packages", index.encode())):
        lines.append(f"echo {base64.b64encode(data).decode()} | base64 -d >{name}")
    lines += ["dpkg -i old.deb", "echo 'deb [trusted=yes] file:/opt/repository ./' >/etc/apt/sources.list.d/local.list"]
    return "\n".join([*lines, "dpkg-query -W probe"])


def identity(disk: Path) -> dict[str, str]:
    """What a Debian disk has of the files that tell a machine from others."""
    raw = disk.parent / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
    names = ["/etc/debian_version", "/etc/machine-id", "/etc/hostname"]
    names += ["/etc/ssh/ssh_host_ed25519_key", "/root/.ssh/authorized_keys", "/etc/ssh/nocloud_keys"]
    debugfs = shutil.which("debugfs", path="/usr/sbin:/sbin") or "debugfs"
    found = {}
    for name in names:
        words = [debugfs, "-R", f"cat {name}", f"{raw}?offset={root_offset(raw)}"]
        found[name] = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    raw.unlink()
    assert found.pop("/etc/debian_version")  # it can be read
    return found


@pytest.mark.long
def test_a_debian_template_is_upgraded_while_a_clone_runs(cloud: Cloud, debian_image: Path, vms: None) -> None:
    add_template(cloud, debian_image, "deb", "--mem", 384, "--init", "systemd")
    new = ("vminstantiate", "-n", "deb", "-g", "pf", "-t", "web", "-o", "name=web", "-w", "400")
    cloud.run(*new, timeout=500).ok()
    base = disk_of(cloud, "templates/deb")
    before = digest(base)
    env = {"NOCLOUD_vmWaitTimeout": "400"}
    done = cloud.run("vm", "-n", "deb", repository(cloud.home), env=env, timeout=500).ok()
    assert done.stdout.endswith("probe\t1\n")
    pid = cloud.qemu("templates/deb")
    cloud.ssh("templates/deb", "test -s /etc/machine-id && test -s /root/.ssh/authorized_keys").ok()
    cloud.ssh("templates/deb", "systemctl poweroff")
    wait_ended(pid, 120)
    cloud.run("vmstop", "-n", "templates/deb").quiet()
    assert present(cloud, "deb") == "deb.l1.img"
    assert not any(identity(disk_of(cloud, "templates/deb")).values()), "it cleaned itself"
    kept = {path: digest(path) for path in (base, disk_of(cloud, "templates/deb"))}
    done = cloud.run("vmupgrade", "deb", env=env, timeout=900).ok()
    assert "upgrading Debian GNU/Linux" in done.stderr and "Setting up probe (2)" in done.stderr
    assert {path: digest(path) for path in kept} == kept and kept[base] == before
    cloud.run(*new, timeout=500).ok()
    script = "dpkg-query -W probe; hostname; cat /etc/machine-id; ls /var/lib/apt/lists"
    shown = cloud.ssh("web01", script).ok().stdout.split()
    assert shown[:3] == ["probe", "2", "web01"] and re.fullmatch("[0-9a-f]{32}", shown[3]) and len(shown) == 4
    old = cloud.ssh("web00", "dpkg-query -W probe; hostname; cat /etc/machine-id").stdout.split()
    assert old[0] == "web00" and old[1] != shown[3]


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
