"""nocloud doctor: each thing is broken in a scratch place, is told of, and the very command that is told mends it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import LAUNCHER, PROGRAM, Cloud, Result, eventually, link_programs
from test_bridge import Host, busybox  # noqa: F401 (a fixture)
from test_completion import add_vm

import nocloud

Run = Callable[..., Result]
long = pytest.mark.long  # the same as another case, in another place
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and network namespaces of a host are root's")


def findings(run: Run, *checks: str, env: dict[str, str] | None = None) -> list[dict[str, str]]:
    """What doctor finds, as JSON; its exit status says whether something is wrong."""
    done = run("doctor", "--json", *checks, env=env)
    assert done.stderr == "", repr(done)
    found: list[dict[str, str]] = json.loads(done.stdout)
    for each in found:
        assert set(each) == {"name", "state", "text", "mend"} and each["state"] in ("ok", "warning", "wrong")
        assert bool(each["mend"]) == (each["state"] != "ok"), each
    assert done.status == int(any(each["state"] == "wrong" for each in found)), repr(done)
    return found


def ill(run: Run, check: str, state: str, *words: str, env: dict[str, str] | None = None) -> str:
    """The command that mends what a check finds, which must be this bad and named by these words."""
    found = [each for each in findings(run, check, env=env) if each["state"] != "ok"]
    assert found, f"{check}: nothing is found"
    assert (found[0]["name"], found[0]["state"]) == (check, state), found
    for word in words:
        assert word in found[0]["text"], found
    return found[0]["mend"]


def well(run: Run, *checks: str, env: dict[str, str] | None = None) -> None:
    found = findings(run, *checks, env=env)
    assert found and all(each["state"] == "ok" for each in found), found


# What doctor looks for, what the commands that it tells consist of, and what this test's own programs need.
USED = (
    "qemu-system-x86_64 qemu-img ssh ssh-keygen ip dnsmasq nsenter pasta nft"
    " xorriso genisoimage mkisofs xorrisofs bash sh env sed tee cat rm mv mkdir chmod chown mount sysctl sleep unshare"
)


@pytest.fixture
def programs(cloud: Cloud) -> Path:
    """A PATH of one folder, with `nocloud` and its names; no sudo, and an `apt` that brings what a package has."""
    folder = cloud.home / "programs"
    folder.mkdir()
    for name in USED.split():
        path = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
        if path:
            (folder / name).symlink_to(path)
    add_own_names(folder, cloud)
    shelf = cloud.home / "shelf"
    shelf.mkdir()
    packages = "\n".join(f"{debian}) names='{names}';;" for debian, names in packages_of_programs().items())
    (folder / "apt-get").write_text("#!/bin/sh\n")
    (folder / "apt").write_text(
        f'#!/bin/sh\n[ "$1" = install ] && shift\nfor package; do\ncase $package in\n{packages}\n'
        f"*) names=$package;; esac\nfor name in $names; do [ -e {shelf}/$name ] && mv {shelf}/$name {folder}/; done\n"
        "done\nexit 0\n"
    )
    for name in ("apt", "apt-get"):
        (folder / name).chmod(0o755)
    cloud.env["PATH"] = str(folder)
    return folder


def add_own_names(folder: Path, cloud: Cloud) -> None:
    for command in nocloud.COMMANDS.values():
        for name in filter(None, ("nocloud", command.alias)):
            (folder / name).unlink(missing_ok=True)
            sub = f" {command.name}" if name != "nocloud" else ""
            (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -IS {LAUNCHER}{sub} "$@"\n')
            (folder / name).chmod(0o755)


def packages_of_programs() -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for line in nocloud.packaged_list("packages"):
        program, package, *_ = line.split()
        found.setdefault(package, []).append(program)
    return {package: " ".join(names) for package, names in found.items()}


def mend(cloud: Cloud, command: str, env: dict[str, str] | None = None, input: str | None = None) -> None:
    """Run it as it is told, but for sudo."""
    cloud.execute(["bash", "-c", command.replace("sudo ", "")], env=env, input=input).ok()


# As it is ############################################################################################


def test_it_looks_at_everything_and_changes_nothing(cloud: Cloud) -> None:
    before = sorted(cloud.home.rglob("*"))
    found = findings(cloud.run)
    assert set(nocloud.CHECKS) <= {each["name"] for each in found}
    shown = cloud.run("doctor")
    lines = [f"{each['state']:<9}{each['name']}: {each['text']}" for each in found]
    told = [line for line in shown.lines if line[0] != " "]
    steady = "ok       space: "  # but for this
    assert [line for line in told if not line.startswith(steady)] == [li for li in lines if not li.startswith(steady)]
    assert [line.strip() for line in shown.lines if line[0] == " "] == [each["mend"] for each in found if each["mend"]]
    assert sorted(cloud.home.rglob("*")) == before and not cloud.processes()


def test_one_check_alone_and_none_of_that_name(cloud: Cloud) -> None:
    assert [each["name"] for each in findings(cloud.run, "keys", "tree")] == ["tree", "keys"]
    cloud.run("doctor", "kees").fails(2, "kees", "keys")


def test_it_is_quick(cloud: Cloud) -> None:
    """Under 2 s; a machine that is busy with other things gets more than one try."""
    taken: list[float] = []
    while len(taken) < 5 and (not taken or taken[-1] > 2):
        taken.append(cloud.run("doctor").seconds)
    assert taken[-1] <= 2, taken


def test_a_network_that_was_killed_is_left_to_the_next_command(blank: Cloud) -> None:
    blank.run("net", "up").ok()
    pid = int((blank.base / ".net/dnsmasq.pid").read_text())
    os.kill(pid, 9)
    findings(blank.run)
    assert not any("dnsmasq" in words for words in blank.processes().values())


def test_what_it_says_of_a_sound_host_is_true(blank: Cloud) -> None:
    """Exit status 0, and a VM starts."""
    assert blank.run("doctor").status == 0
    blank.run("vminstantiate", "-n", "blank", "-g", "pf").ok()


# The configuration ###################################################################################


def test_a_line_that_is_no_setting(cloud: Cloud, programs: Path) -> None:
    conf = cloud.home / ".nocloud.conf"
    conf.write_text("vmMem=512\nvmCpu=$(nproc)\n")
    assert cloud.run("vmrunning").status == 2
    command = ill(cloud.run, "configuration", "wrong", ".nocloud.conf:2")
    mend(cloud, command)
    well(cloud.run, "configuration")
    assert conf.read_text() == "vmMem=512\n# vmCpu=$(nproc)\n"
    cloud.run("vmrunning").ok()


def test_a_value_a_key_and_a_variable_that_are_wrong(cloud: Cloud, programs: Path) -> None:
    conf = cloud.home / ".nocloud.conf"
    conf.write_text("vmMem=1G\n")
    mend(cloud, ill(cloud.run, "configuration", "wrong", "MB"))
    well(cloud.run, "configuration")
    conf.write_text("vmMemm=512\n")
    mend(cloud, ill(cloud.run, "configuration", "warning", "vmMemm", "vmMem?"))
    well(cloud.run, "configuration")
    env = {"NOCLOUD_vmCpu": "many"}
    command = ill(cloud.run, "configuration", "wrong", "vmCpu", env=env)
    words = " ".join(cloud.argv("doctor", "configuration"))
    assert cloud.execute(["bash", "-c", f"{command}; {words}"], env=env).ok().stdout.startswith("ok ")


def test_a_file_that_others_may_write(cloud: Cloud, programs: Path) -> None:
    (cloud.home / ".nocloud.conf").chmod(0o666)
    mend(cloud, ill(cloud.run, "configuration", "warning", "others may write"))
    well(cloud.run, "configuration")


def test_a_file_that_came_with_a_repository(cloud: Cloud, programs: Path) -> None:
    here = cloud.home / "here"
    here.mkdir()
    (here / ".nocloud.conf").write_text("vmQemu=/bin/false\nvmExtraOpts=\n")
    run = functools.partial(cloud.run, cwd=here)
    command = ill(run, "configuration", "warning", "vmQemu, vmExtraOpts")
    assert command == "nocloud trust ./.nocloud.conf"
    cloud.run("trust", "./.nocloud.conf", cwd=here).ok()
    well(run, "configuration")


@root_only
def test_a_file_of_another_user(cloud: Cloud, programs: Path) -> None:
    os.chown(cloud.home / ".nocloud.conf", 12345, -1)
    mend(cloud, ill(cloud.run, "configuration", "warning", "another user"))
    well(cloud.run, "configuration")


# The tree ############################################################################################


def test_a_tree_that_is_a_file_or_anyones(cloud: Cloud, programs: Path) -> None:
    cloud.base.touch()
    mend(cloud, ill(cloud.run, "tree", "wrong", "no folder"))
    well(cloud.run, "tree")
    cloud.base.mkdir()
    cloud.base.chmod(0o777)
    mend(cloud, ill(cloud.run, "tree", "warning", "others may write"))
    well(cloud.run, "tree")


def test_a_tree_of_nobodys_home(cloud: Cloud, programs: Path) -> None:
    env = {"NOCLOUD_vmBaseDir": "~nosuchuser/vms"}
    command = ill(cloud.run, "configuration", "wrong", "nosuchuser", env=env)
    words = " ".join(cloud.argv("doctor", "configuration", "tree"))
    cloud.execute(["bash", "-c", f"{command}; {words}"], env=env).ok()


def add_image(cloud: Cloud, place: str, backing: str = "") -> Path:
    """A VM, or a template, that is stopped: its conf and its disk."""
    folder = cloud.base / place
    folder.mkdir(parents=True)
    words = ["-F", "qcow2", "-b", backing] if backing else []
    cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", *words, folder / f"{folder.name}_0.img", "8M"]).ok()
    (folder / f"{folder.name}.conf").write_text(f"vmName={folder.name}\nvmDisk={place}/{folder.name}_0.img\n")
    return folder


def add_stopped(cloud: Cloud) -> Path:
    add_image(cloud, "templates/blank")
    return add_image(cloud, "pf/default/web00", "../../../templates/blank/blank_0.img")


def test_what_killed_commands_left(cloud: Cloud, programs: Path) -> None:
    folder = add_stopped(cloud)
    well(cloud.run, "vms")
    for name in ("pf/default/.new-web07", "pf/default/.del-web 08", "templates/.new-x"):
        (cloud.base / name).mkdir()
        (cloud.base / name / "disk").touch()
    command = ill(cloud.run, "vms", "warning", "3 folders")
    mend(cloud, command)
    well(cloud.run, "vms")
    (folder / "qmp.sock").touch()  # of a qemu that was killed: the next start makes it anew
    well(cloud.run, "vms")
    assert folder.is_dir()


def test_what_is_being_made_is_left_over_by_nobody(cloud: Cloud) -> None:
    making = cloud.base / "pf/default/.new-web00"
    making.mkdir(parents=True)
    with nocloud.FolderLock(str(making)):
        well(cloud.run, "vms")


def test_a_vm_whose_disk_is_gone(cloud: Cloud, programs: Path) -> None:
    add_stopped(cloud)
    add_image(cloud, "templates/other")
    add_image(cloud, "two/default/sql00", "../../../templates/other/other_0.img")
    well(cloud.run, "vms")
    (cloud.base / "templates/other/other_0.img").unlink()
    found = [each for each in findings(cloud.run, "vms") if each["state"] == "warning"]
    assert [each["text"].partition(" ")[0] for each in found] == ["two/default/sql00", "templates/other"]
    for each in found:
        assert "other_0.img is gone" in each["text"] and "only if" in each["mend"]
        mend(cloud, each["mend"])
    well(cloud.run, "vms")
    assert (cloud.base / "pf/default/web00").is_dir()


def test_a_conf_that_can_not_be_used(cloud: Cloud, programs: Path) -> None:
    folder = add_stopped(cloud)
    conf = folder / "web00.conf"
    text = conf.read_text()
    conf.chmod(0o666)
    mend(cloud, ill(cloud.run, "vms", "warning", "others may write"))
    well(cloud.run, "vms")
    conf.write_text("")
    mend(cloud, ill(cloud.run, "vms", "warning", "is empty"))
    well(cloud.run, "vms")
    assert conf.read_text() == "vmName=web00\nvmDisk=pf/default/web00/web00_0.img\n"
    conf.write_text(text + "vmMem=a lot\n")
    mend(cloud, ill(cloud.run, "vms", "warning", f"{conf}:"))
    well(cloud.run, "vms")
    conf.unlink()
    mend(cloud, ill(cloud.run, "vms", "warning", f"{folder} is no VM: web00.conf is gone"))
    well(cloud.run, "vms")
    folder.rename(folder.with_name("renamed"))
    mend(cloud, ill(cloud.run, "vms", "warning", "renamed is no VM: web00.conf is in it"))
    well(cloud.run, "vms")
    shutil.copytree(folder, folder.with_name("copy"))
    mend(cloud, ill(cloud.run, "vms", "warning", "copy is no VM: web00.conf is in it"))
    assert (cloud.home / "copy/web00.conf").exists()
    well(cloud.run, "vms")
    if os.geteuid() != 0:
        conf.chmod(0)
        mend(cloud, ill(cloud.run, "vms", "warning", "Permission denied"))
        well(cloud.run, "vms")


# Programs ############################################################################################


IN_SBIN = ("ip", "dnsmasq", "nft")


@pytest.mark.parametrize(
    ("missing", "check", "state"),
    [
        (["qemu-system-x86_64"], "qemu", "wrong"),
        pytest.param(["qemu-img"], "qemu", "wrong", marks=long),
        pytest.param(["ssh"], "ssh", "wrong", marks=long),
        (["ssh-keygen"], "ssh", "wrong"),
        (["dnsmasq", "nsenter"], "private-network", "wrong"),
        pytest.param(["ip"], "private-network", "wrong", marks=long),
        (["pasta"], "way-out", "warning"),
        pytest.param(["nft"], "way-out", "warning", marks=long),
    ],
    ids=lambda words: words if isinstance(words, str) else " ".join(words),
)
def test_a_program_that_is_missing(cloud: Cloud, programs: Path, missing: list[str], check: str, state: str) -> None:
    """The sbin folders are looked in too, so they are empty here."""
    for name in IN_SBIN:
        if (programs / name).exists():
            real = (programs / name).resolve()
            (programs / name).unlink()
            shutil.copy(real, programs / name)
    if not all((programs / name).exists() for name in missing):
        pytest.skip(f"{' or '.join(missing)} is not installed")
    hide(cloud, programs, *missing)
    with Inside(cloud, "for place in /usr/sbin /usr/local/sbin; do mount -t tmpfs none $place; done") as inside:
        inside.mend(ill(inside.run, check, state, missing[0]))
        well(inside.run, check)


def hide(cloud: Cloud, programs: Path, *names: str) -> None:
    """Off the PATH, and on the shelf that apt takes it from."""
    for name in names:
        (programs / name).rename(cloud.home / "shelf" / name)


def replace(programs: Path, name: str, script: str) -> None:
    """A program in the place of another, which it knows as $REAL."""
    real = os.path.realpath(programs / name)
    (programs / name).unlink()
    (programs / name).write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
    (programs / name).chmod(0o755)


def test_a_qemu_that_is_too_old(cloud: Cloud, programs: Path) -> None:
    real = os.readlink(programs / "qemu-system-x86_64")
    answer = """sed -u 's/"micro": [0-9]*, "minor": [0-9]*, "major": [0-9]*/"micro": 0, "minor": 2, "major": 5/'"""
    replace(programs, "qemu-system-x86_64", f'"$REAL" "$@" | {answer}')
    (cloud.home / "shelf/qemu-system-x86_64").symlink_to(real)
    mend(cloud, ill(cloud.run, "qemu", "wrong", "5.2.0", "6.2"))
    well(cloud.run, "qemu")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('"$REAL" "$@" | sed -u s/sandbox/sandpit/g', ("-sandbox",)),
        ('case "$*" in *spice*) exit 1;; esac; "$REAL" "$@" | sed -u \'s/"vnc"/"vncless"/g\'', ("SPICE", "VNC")),
    ],
)
def test_what_a_qemu_lacks(cloud: Cloud, programs: Path, script: str, words: tuple[str, ...]) -> None:
    real = os.readlink(programs / "qemu-system-x86_64")
    replace(programs, "qemu-system-x86_64", script)
    (cloud.home / "shelf/qemu-system-x86_64").symlink_to(real)
    mend(cloud, ill(cloud.run, "qemu", "warning", *words))
    well(cloud.run, "qemu")


def test_a_qemu_without_vvfat(cloud: Cloud, programs: Path) -> None:
    replace(programs, "qemu-system-x86_64", '"$REAL" "$@" | sed -u s/vvfat/fatless/g')
    writers = [name for name in ("xorriso", "genisoimage", "mkisofs", "xorrisofs") if (programs / name).is_symlink()]
    hide(cloud, programs, *writers)
    if "xorriso" not in writers:
        pytest.skip("xorriso is not installed")
    mend(cloud, ill(cloud.run, "qemu", "warning", "vvfat"))
    well(cloud.run, "qemu")


def test_building(cloud: Cloud, programs: Path) -> None:
    """What isn't there is named with what brings it; VMs start all the same."""
    assert not (programs / "mmdebstrap").exists()
    assert "mmdebstrap" in ill(cloud.run, "building", "warning", "mmdebstrap: not found")


# Keys ################################################################################################


def test_keys(cloud: Cloud, programs: Path) -> None:
    ssh = cloud.home / ".ssh"
    ssh.mkdir(mode=0o700)
    mend(cloud, ill(cloud.run, "keys", "warning", "no key of yours"), input=f"{ssh}/id_ed25519\n\n\n")
    well(cloud.run, "keys")
    (ssh / "id_ed25519").chmod(0o644)
    mend(cloud, ill(cloud.run, "keys", "warning", "others may read"))
    well(cloud.run, "keys")
    own = cloud.home / "config/nocloud/id_ed25519"
    own.parent.mkdir(parents=True, mode=0o700)
    cloud.execute(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own]).ok()
    well(cloud.run, "keys")
    own.chmod(0o640)
    mend(cloud, ill(cloud.run, "keys", "wrong", str(own)))
    well(cloud.run, "keys")
    own.with_suffix(".pub").unlink()
    mend(cloud, ill(cloud.run, "keys", "wrong", "id_ed25519.pub is gone"))
    well(cloud.run, "keys")


# User namespaces and limits, in a user namespace whose own limits are set ############################


class Inside:
    """A user namespace: what its limits are is its own; inside, one is root, and `sysctl -w` sets them."""

    def __init__(self, cloud: Cloud, script: str) -> None:
        self.cloud = cloud
        words = ["/usr/bin/unshare", "-Urm", "sh", "-c", f"{script}; echo ready; exec sleep infinity"]
        self.child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=cloud.env)
        assert self.child.stdout
        if self.child.stdout.readline() != "ready\n":
            self.close()
            pytest.skip("no user namespaces here")

    def execute(self, *argv: object, env: dict[str, str] | None = None) -> Result:
        way = [
            "/usr/bin/nsenter",
            "-t",
            self.child.pid,
            "-U",
            "-m",
            "--preserve-credentials",
            f"--wd={self.cloud.home}",
        ]
        return self.cloud.execute([*way, "--", *argv], env=env)

    def run(self, name: str, *words: object, env: dict[str, str] | None = None) -> Result:
        return self.execute(*self.cloud.argv(name, *words), env=env)

    def mend(self, command: str) -> None:
        """As root, whose PATH has the sbin folders."""
        path = f"{self.cloud.env['PATH']}:/usr/sbin:/sbin"
        self.execute("bash", "-c", command.replace("sudo ", ""), env={"PATH": path}).ok()

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@pytest.mark.parametrize("limit", ["max_user_namespaces", pytest.param("max_net_namespaces", marks=long)])
def test_user_namespaces_that_are_denied(cloud: Cloud, limit: str) -> None:
    with Inside(cloud, f"echo 0 > /proc/sys/user/{limit}") as inside:
        command = ill(inside.run, "namespaces", "wrong", "no user namespaces")
        assert command == f"sysctl -w user.{limit}=65536"
        inside.mend(command)
        well(inside.run, "namespaces")


@pytest.mark.parametrize(
    ("name", "forbids", "allows"),
    [("apparmor_restrict_unprivileged_userns", "1", "0"), ("unprivileged_userns_clone", "0", "1")],
)
def test_user_namespaces_that_the_distribution_denies(cloud: Cloud, name: str, forbids: str, allows: str) -> None:
    """Ubuntu's rule and Debian's old one.  This kernel has neither, so its file is a stand-in, and the denial is the
    one above: what the command writes there is seen, but that it mends the denial can't be."""
    stand_in = cloud.home / "sysctl"
    stand_in.mkdir()
    (stand_in / name).write_text(f"{forbids}\n")
    script = f"mount --bind {stand_in} /proc/sys/kernel; echo 0 > /proc/sys/user/max_user_namespaces"
    with Inside(cloud, script) as inside:
        command = ill(inside.run, "namespaces", "wrong", "no user namespaces")
        assert command == f"sysctl -w kernel.{name}={allows}"
        inside.mend(command)
        assert (stand_in / name).read_text().strip() == allows
        inside.mend(ill(inside.run, "namespaces", "wrong"))  # now it is the other one that forbids
        well(inside.run, "namespaces")


def test_no_inotify_instance_is_left(cloud: Cloud) -> None:
    with Inside(cloud, "echo 0 > /proc/sys/user/max_inotify_instances") as inside:
        inside.run("net", "--private", "up").fails(1, "failed to create inotify: Too many open files")


@root_only
def test_a_tree_without_space(cloud: Cloud) -> None:
    cache = cloud.home / "vms/cache"
    env = {"XDG_CACHE_HOME": str(cache)}
    script = f"mkdir -p {cloud.base}; mount -t tmpfs -o size=8m tree {cloud.base}; mkdir -p {cache}/nocloud"
    with Inside(cloud, f"{script}; dd if=/dev/zero of={cache}/nocloud/image bs=64k 2>&-") as inside:
        inside.mend(ill(inside.run, "space", "wrong", "0 MB are free", env=env))
        # 8 MB is little, and no cache is left that could go
        assert "larger file system" in ill(inside.run, "space", "warning", env=env)
        inside.execute("mount", "-o", "remount,size=3g", cloud.base).ok()
        well(inside.run, "space", env=env)


@root_only
def test_a_tree_on_a_file_system_that_is_read_only(cloud: Cloud) -> None:
    with Inside(cloud, f"mkdir -p {cloud.base}; mount -t tmpfs -o ro,mode=755 tree {cloud.base}") as inside:
        inside.mend(ill(inside.run, "tree", "wrong", "read-only"))
        well(inside.run, "tree")


# What it is called on hosts that have next to nothing ################################################


@pytest.mark.parametrize(
    "script",
    ["mount -t tmpfs none /proc/sys; mount -t tmpfs none /sys", "mount -t tmpfs none /proc/self/net", "true"],
)
def test_it_never_falls_over(cloud: Cloud, script: str) -> None:
    with Inside(cloud, script) as inside:
        for env in ({}, {"PATH": "/nonexistent", "HOME": "/nonexistent"}, {"NOCLOUD_vmNetwork": "bridge"}):
            words = [f"{key}={value}" for key, value in env.items()]
            done = inside.execute("/usr/bin/env", *words, *cloud.argv("doctor", "--json"))
            assert done.stderr == "", repr(done)
            found = json.loads(done.stdout)
            assert len(found) >= len(nocloud.CHECKS)
            assert not [each for each in found if "can't be looked at" in each["text"]], found


@root_only
def test_a_user_without_a_name(cloud: Cloud) -> None:
    argv = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", *cloud.argv("doctor", "--json")]
    cloud.home.chmod(0o755)
    for folder in [cloud.home, *cloud.home.parents]:
        if folder.stat().st_uid == os.geteuid() and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    done = cloud.execute(argv, env={"HOME": "/nonexistent"}, cwd=Path("/"))
    assert done.stderr == "" and json.loads(done.stdout), repr(done)
    assert "can't be looked at" not in done.stdout, done.stdout


# Devices and rights of an ordinary user, on a host whose /dev, /etc and qemu are scratch #############


class Room:
    """A mount namespace of root's with a /dev and an /etc of its own, in which `nobody` looks."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.etc = cloud.home / "etc"
        shutil.copytree("/etc", self.etc, symlinks=True, ignore=shutil.ignore_patterns("ssl", "alternatives"))
        group = [line for line in (self.etc / "group").read_text().splitlines() if not line.startswith("kvm:")]
        (self.etc / "group").write_text("\n".join([*group, "kvm:x:54321:", ""]))
        self.helpers = cloud.home / "helpers"
        self.helpers.mkdir()
        shutil.copy("/bin/true", self.helpers / "qemu-bridge-helper")
        for path in (cloud.home, *cloud.home.parents):
            if path.stat().st_uid == 0 and path.stat().st_mode & 0o005 != 0o005 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o055)
        dev = cloud.home / "dev"
        dev.mkdir()
        script = (
            f"mount -t tmpfs -o mode=755 dev {dev}; cd {dev}; mknod null c 1 3; mknod zero c 1 5; mknod urandom c 1 9;"
            f"chmod 666 null zero urandom; mkdir net; mount --bind {dev} /dev; mount --bind {self.etc} /etc;"
            f"mount --bind {self.helpers} {self.helpers}; mount --bind {self.helpers} /usr/lib/qemu"
        )
        words = ["unshare", "-n", "-m", "sh", "-c", f"set -e; {script}; echo ready; exec sleep infinity"]
        self.child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=cloud.env)
        assert self.child.stdout and self.child.stdout.readline() == "ready\n"

    def root(self, script: str) -> None:
        """A command of root's, on a PATH that has this test's own programs first."""
        way = ["nsenter", "-t", self.child.pid, "-n", "-m", f"--wd={self.cloud.home}", "--"]
        self.cloud.execute([*way, "bash", "-ec", script.replace("sudo ", "")]).ok()

    def run(self, name: str, *words: object, env: dict[str, str] | None = None) -> Result:
        """A command of nobody's, who has just logged in."""
        way = ["nsenter", "-t", self.child.pid, "-n", "-m", f"--wd={self.cloud.home}", "--"]
        login = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--init-groups"]
        return self.cloud.execute([*way, *login, *self.cloud.argv(name, *words)], env=env)

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()


@pytest.fixture
def room(cloud: Cloud) -> Iterator[Room]:
    if os.geteuid() != 0:
        pytest.skip("devices and mounts of a host are root's")
    room = Room(cloud)
    cloud.env["NOCLOUD_vmBaseDir"] = "/tmp/nocloud-nobody"  # is not made
    cloud.env["NOCLOUD_NOKVM"] = "0"
    try:
        yield room
    finally:
        room.close()


def test_hardware_acceleration(room: Room) -> None:
    """From a host without the module to one where KVM would be used; the processor's flags are a stand-in's."""
    cpuinfo = room.cloud.home / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu vmx sse\n")
    room.root(f"mount --bind {cpuinfo} /proc/cpuinfo")
    programs = room.cloud.home / "bin"
    programs.mkdir()
    (programs / "modprobe").write_text('#!/bin/sh\n[ "$1" = kvm_intel ] && mknod -m 660 /dev/kvm c 1 3\n')
    (programs / "modprobe").chmod(0o755)
    real = shutil.which("qemu-system-x86_64")
    qemu = programs / "qemu-system-x86_64"
    qemu.write_text(f'#!/bin/sh\ncase "$*" in *"-accel kvm"*) exit 0;; esac\nexec {real} "$@"\n')
    qemu.chmod(0o755)
    room.cloud.env["PATH"] = f"{programs}:{room.cloud.env['PATH']}"
    command = ill(room.run, "acceleration", "warning", "no /dev/kvm")
    assert command == "sudo modprobe kvm_intel"
    room.root(command)
    command = ill(room.run, "acceleration", "warning", "may not open /dev/kvm", "Permission denied")
    assert "chgrp kvm" in command and "usermod -aG kvm nobody" in command
    room.root(command)  # root's alone: its group, and ours
    well(room.run, "acceleration")
    room.root("gpasswd -d nobody kvm")
    command = ill(room.run, "acceleration", "warning", "may not open /dev/kvm")
    assert command.startswith("sudo usermod -aG kvm nobody")
    room.root(command)
    well(room.run, "acceleration")
    assert "kvm" in room.run("doctor", "acceleration").stdout.lower()
    qemu.unlink()  # the real one, given a device that is no KVM
    assert "vmAccel=kvm" in ill(room.run, "acceleration", "warning", "a guest does not run with it: ")


def test_a_processor_without_virtualization(room: Room) -> None:
    """No command of this system mends that: it is the firmware's, or another machine's, to turn on."""
    cpuinfo = room.cloud.home / "cpuinfo"
    for flags, words in (("fpu sse hypervisor", "nested"), ("fpu sse", "firmware")):
        cpuinfo.write_text(f"flags\t\t: {flags}\n")
        room.root(f"mount --bind {cpuinfo} /proc/cpuinfo; rm -f /dev/kvm; mknod -m 666 /dev/kvm c 1 3")
        assert words in ill(room.run, "acceleration", "warning", "neither vmx nor svm")
        room.root("rm /dev/kvm")
        assert words in ill(room.run, "acceleration", "warning", "no /dev/kvm")
    assert "firmware" in ill(room.run, "acceleration", "wrong", env={"NOCLOUD_vmAccel": "kvm"})
    well(room.run, "acceleration", env={"NOCLOUD_vmAccel": "tcg"})


def test_the_tun_device(room: Room) -> None:
    if not os.path.isdir("/sys/class/misc/tun"):
        pytest.skip("this kernel has no tun driver")
    room.root(ill(room.run, "tun", "wrong", "no /dev/net/tun"))
    well(room.run, "tun")
    room.root("chmod 600 /dev/net/tun")
    room.root(ill(room.run, "tun", "wrong", "may not open"))
    well(room.run, "tun")


def test_the_bridge_helper(room: Room) -> None:
    helper = "/usr/lib/qemu/qemu-bridge-helper"
    env = {"NOCLOUD_vmNetwork": "bridge"}
    room.root(f"chmod 755 {helper}")
    room.root(ill(room.run, "bridge-helper", "wrong", "not setuid", env=env))
    well(room.run, "bridge-helper")
    room.root(f"chown 12345 {helper}; chmod 4755 {helper}")
    room.root(ill(room.run, "bridge-helper", "wrong", "not setuid", env=env))
    well(room.run, "bridge-helper")
    room.root(f"chgrp kvm {helper}; chmod 4750 {helper}")
    command = ill(room.run, "bridge-helper", "wrong", "may not run", env=env)
    assert "usermod -aG kvm nobody" in command
    room.root(command)
    well(room.run, "bridge-helper")
    room.root(f"mv {helper} {room.cloud.home}/kept")
    command = ill(room.run, "bridge-helper", "wrong", "not there", env=env)
    assert command == nocloud.install_command("qemu-bridge-helper")  # apt itself: see the missing programs
    assert ill(room.run, "bridge-helper", "warning", "not there") == command  # the private network serves


def test_the_helpers_list(room: Room) -> None:
    conf = room.etc / "qemu/bridge.conf"
    shutil.rmtree(conf.parent, ignore_errors=True)
    env = {"NOCLOUD_vmNetwork": "bridge"}
    room.root(ill(room.run, "bridge-conf", "wrong", "there is no", env=env))
    well(room.run, "bridge-conf")
    assert conf.read_text() == "allow nocloud\n"
    for text, state, words in (
        ("# allow nocloud\nallow virbr0\n", "wrong", "has no line: allow nocloud"),
        ("allow virbr0\nallow all\n", "warning", "`allow all`"),
        ("allow nocloud\ndeny all\n", "wrong", "`deny all` keeps VMs off"),
        ("allow nocloud\ndeny nocloud\n", "wrong", "`deny nocloud` keeps VMs off"),
    ):
        conf.write_text(text)
        room.root(ill(room.run, "bridge-conf", state, words, env=env))
        well(room.run, "bridge-conf")
        assert "allow nocloud" in conf.read_text() and ("virbr0" in conf.read_text()) == ("virbr0" in text)
    conf.chmod(0o600)
    room.root(ill(room.run, "bridge-conf", "wrong", "may not read", env=env))
    well(room.run, "bridge-conf")
    conf.parent.chmod(0o700)
    room.root(ill(room.run, "bridge-conf", "wrong", "may not read", env=env))
    well(room.run, "bridge-conf")


def test_who_may_publish_on_the_bridge(room: Room) -> None:
    """The folders are root's and the group's, as `net up` makes them."""
    room.root(
        "mount -t sysfs sysfs /sys; mount -t tmpfs lib /var/lib;"
        "ip link add nocloud address 02:6e:63:00:00:01 type bridge;"
        "mkdir -p /var/lib/nocloud/published; chgrp kvm /var/lib/nocloud/*; chmod 3770 /var/lib/nocloud/*"
    )
    command = ill(room.run, "publishing", "warning", "may not write")
    assert command.startswith("sudo usermod -aG kvm nobody")
    room.root(command)
    well(room.run, "publishing")


def test_a_private_subnet_that_a_vpn_has_too(room: Room) -> None:
    cloud = room.cloud
    cloud.env["NOCLOUD_vmBaseDir"] = str(cloud.base)
    (cloud.home / "bin").mkdir()
    add_own_names(cloud.home / "bin", cloud)
    cloud.env["PATH"] = f"{cloud.home}/bin:{cloud.env['PATH']}"
    (cloud.base / ".net").mkdir(parents=True)
    (cloud.base / ".net/subnet").write_text("10.88.0\n")
    well(room.run, "private-subnet")
    (cloud.base / ".net/subnet").write_text("10.88\n")
    room.root(ill(room.run, "private-subnet", "wrong", "beginning of an address"))
    well(room.run, "private-subnet")
    room.root("ip link add vpn type bridge; ip link set vpn up; ip addr add 10.88.0.9/20 dev vpn")
    command = ill(room.run, "private-subnet", "warning", "10.88.0.0/20")
    add_vm(cloud.base, "pf/default/web00")
    # Nothing mends it for VMs that have addresses already, and nothing is told that would cost them.
    assert "vmstop" not in ill(room.run, "private-subnet", "warning", "10.88.0.0/20")
    shutil.rmtree(cloud.base / "pf")
    room.root(command)
    well(room.run, "private-subnet")


# The host's bridge ###################################################################################


@pytest.fixture(scope="module")
def bridged(tmp_path_factory: pytest.TempPathFactory, busybox: Path) -> Iterator[Host]:  # noqa: F811
    """A host of its own on which root has made the bridge; `nocloud` and its settings are in a prefix."""
    if os.geteuid() != 0:
        pytest.skip("the host's bridge is root's")
    with Cloud(tmp_path_factory.mktemp("bridged") / "home") as cloud:
        prefix = cloud.home / "prefix"
        for folder in ("bin", "etc", "fakes"):
            (prefix / folder).mkdir(parents=True)
        shutil.copy(PROGRAM, prefix / "bin/nocloud.py")
        shutil.copytree(PROGRAM.parent / "etc", prefix / "bin/etc")  # which the zipapp has inside
        shutil.copy(PROGRAM.parent / "etc/nocloud_net.conf", prefix / "etc")
        code = "sys.path.insert(0, sys.argv[1]); import nocloud; sys.exit(nocloud.main(['nocloud', *sys.argv[2:]]))"
        words = f'{sys.executable} -ISc "import sys; {code}" {prefix}/bin'
        (prefix / "bin/nocloud").write_text(f'#!/bin/sh\nexec {words} "$@"\n')  # a script is compiled at each call
        (prefix / "bin/nocloud").chmod(0o755)
        cloud.env["PATH"] = f"{prefix}/fakes:{prefix}/bin:{cloud.env['PATH']}"
        host = Host(cloud, busybox)
        try:
            host.shell("nocloud net up").ok()
            yield host
        finally:
            host.close()


@pytest.fixture
def host(bridged: Host) -> Host:
    """The bridge is up, and all is well."""
    bridged.shell("nocloud net up").ok()
    return bridged


def look(host: Host) -> Run:
    """doctor, as it is installed there."""
    return lambda name, *words, env=None: host.at(host.pid, "nocloud", name, *words, env=env)


def mend_at(host: Host, command: str) -> None:
    host.at(host.pid, "bash", "-c", command.replace("sudo ", "")).ok()


def test_a_bridge_that_is_sound(host: Host) -> None:
    checks = [name for name in nocloud.BRIDGE_CHECKS if name not in ("names", "bridge-helper")]
    well(look(host), "bridge", *checks)


def test_a_bridge_that_is_down_or_gone(host: Host) -> None:
    run = look(host)
    host.shell("ip link set nocloud down").ok()
    mend_at(host, ill(run, "bridge", "warning", "is down"))
    well(run, "bridge")
    host.shell("nocloud net down").ok()
    assert [each["name"] for each in findings(run)][-1] == "bridge"  # without one, nothing more is looked at
    well(run, "bridge")
    env = {"NOCLOUD_vmNetwork": "bridge"}
    mend_at(host, ill(run, "bridge", "wrong", "there is no bridge nocloud", env=env))
    well(run, "bridge", env=env)


def test_either_network_will_do(host: Host) -> None:
    """What only the private network lacks is wrong where VMs would be on that one."""
    home = host.cloud.home
    path = f"{home}/prefix/bin:{link_programs(home / 'farm', 'nsenter')}"

    def run(name: str, *words: object, env: dict[str, str] | None = None) -> Result:
        return host.at(host.pid, "/usr/bin/env", f"PATH={path}", "nocloud", name, *words, env=env)

    ill(run, "private-network", "warning", "nsenter")
    assert not [each for each in findings(run) if each["state"] == "wrong"]
    ill(run, "private-network", "wrong", "nsenter", env={"NOCLOUD_vmNetwork": "private"})
    host.shell("ip link set nocloud down").ok()
    ill(run, "private-network", "wrong", "nsenter")
    assert run("doctor").status == 1
    (home / "farm/nsenter").symlink_to("/usr/bin/nsenter")
    assert run("doctor").status == 0


def test_a_port_that_another_program_has(host: Host) -> None:
    run, env = look(host), {"NOCLOUD_vmNetwork": "bridge"}
    pid = int(host.shell("cat /run/nocloud/dnsmasq.pid").stdout)
    os.kill(pid, 9)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "dnsmasq is gone")
    for kind, port in (("SOCK_DGRAM", 53), ("SOCK_STREAM", 53), ("SOCK_DGRAM", 67)):
        code = f"import socket as s, signal; x = s.socket(s.AF_INET, s.{kind}); x.bind(('0.0.0.0', {port}))"
        code += "; x.listen()" if kind == "SOCK_STREAM" else ""
        code += "; print('+', flush=True); signal.pause()"
        argv = ["nsenter", "-t", str(host.pid), "-n", "-m", "--", sys.executable, "-ISc", code]
        other = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=host.cloud.env)
        assert other.stdout and other.stdout.readline() == "+\n"
        command = ill(run, "dnsmasq", "wrong", f"port {port}", f"process {other.pid}", env=env)
        mend_at(host, command)
        other.communicate()
    mend_at(host, ill(run, "dnsmasq", "wrong", "no DHCP and DNS at 192.168.1.1", env=env))
    well(run, "dnsmasq", env=env)


JUMP = (
    "iptables-nft -P FORWARD DROP; iptables-nft -N {0}; iptables-nft -A {0} -j RETURN; iptables-nft -A FORWARD -j {0}"
)
DROPPING = {
    "Docker": JUMP.format("DOCKER-USER"),
    "ufw": JUMP.format("ufw-before-forward"),
    "something else": "iptables-legacy -P FORWARD DROP",
}


@pytest.mark.parametrize("who", ["Docker", pytest.param("ufw", marks=long), pytest.param("something else", marks=long)])
def test_forwarding_that_others_forbid(host: Host, who: str) -> None:
    run = look(host)
    host.shell(DROPPING[who]).ok()
    program = DROPPING[who].split()[0]
    mend_at(host, ill(run, "forwarding", "warning", f"{program} has rules, and doesn't accept the bridge"))
    well(run, "forwarding")
    host.shell(f"{program} -P FORWARD ACCEPT; {program} -F; {program} -X").ok()


def test_folders_that_are_gone(host: Host) -> None:
    host.shell("rm -rf /var/lib/nocloud/published").ok()
    mend_at(host, ill(look(host), "publishing", "warning", "is gone"))
    well(look(host), "publishing")


def test_rules_that_are_gone_and_a_table_that_drops(host: Host) -> None:
    run = look(host)
    host.shell("echo 0 >/proc/sys/net/ipv4/conf/eth0/forwarding").ok()
    mend_at(host, ill(run, "forwarding", "warning", "eth0 doesn't forward"))
    well(run, "forwarding")
    host.shell("nft flush ruleset").ok()
    mend_at(host, ill(run, "forwarding", "warning", "rules are gone"))
    well(run, "forwarding")
    host.shell(
        "nft add table inet mine && nft add chain inet mine f '{ type filter hook forward priority 0; policy drop; }'"
    ).ok()
    mend_at(host, ill(run, "forwarding", "warning", "inet mine f"))
    well(run, "forwarding")
    host.shell("nft delete table inet mine").ok()


def test_a_bridge_of_somebody_else(host: Host) -> None:
    host.shell("nocloud net down; ip link add nocloud type bridge").ok()
    try:
        mend_at(host, ill(look(host), "bridge", "warning", "is down"))
        well(look(host), "bridge", "forwarding")
    finally:
        host.shell("ip link delete nocloud").ok()


def fake(host: Host, name: str, script: str) -> Path:
    path = host.cloud.home / "prefix/fakes" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_firewalld_and_resolved(host: Host) -> None:
    """Programs in their place that keep what they are told, as those do."""
    run, home = look(host), host.cloud.home
    (home / "zone").write_text("public\n")
    (home / "domains").write_text("Link 3 (nocloud):\n")
    firewalld = f"--get-zone*) cat {home}/zone;; *--change*) echo trusted >{home}/zone;;"
    resolved = f'"domain nocloud") cat {home}/domains;; *~*) echo "$@" >>{home}/domains;;'
    scripts = {"firewall-cmd": firewalld, "resolvectl": resolved}
    paths = [fake(host, name, f'case "$*" in {script} esac') for name, script in scripts.items()]
    host.shell("mkdir -p /run/systemd/resolve").ok()
    try:
        for check, words in (("firewalld", "public"), ("names", "don't resolve")):
            mend_at(host, ill(run, check, "warning", words))
            well(run, check)
        (home / "zone").write_text("\n")
        mend_at(host, ill(run, "firewalld", "warning", "none of its zones"))
        well(run, "firewalld")
    finally:
        for path in paths:
            path.unlink()
        host.shell("rmdir /run/systemd/resolve").ok()


def test_ufw(host: Host) -> None:
    run, home = look(host), host.cloud.home
    (home / "added").write_text("ufw allow 22/tcp\n")
    script = f'case "$*" in status) echo "Status: active";; "show added") cat {home}/added;; *delete*) ;;'
    script += f""" *) echo "ufw ${{*%% comment*}} comment 'made by nocloud'" >>{home}/added;; esac"""
    path = fake(host, "ufw", script)
    try:
        mend_at(host, ill(run, "ufw", "warning", "doesn't let guests pass"))
        well(run, "ufw")
    finally:
        path.unlink()


def test_names_without_resolved(host: Host) -> None:
    """systemd-resolved can't be installed in here: what apt is told is seen, and resolv.conf does it another way."""
    assert "systemd-resolved" in ill(look(host), "names", "warning", "runs no systemd-resolved")
    resolv = host.cloud.home / "etc/resolv.conf"
    resolv.write_text("nameserver 192.168.1.1\n")
    well(look(host), "names")
    resolv.write_text("")


def test_a_subnet_that_another_interface_has_too(host: Host) -> None:
    run = look(host)
    host.shell("ip link add lan type bridge; ip addr add 192.168.1.7/24 dev lan; ip link set lan up").ok()
    try:
        mend_at(host, ill(run, "bridge-subnet", "warning", "lan has 192.168.1.7/24"))
        well(run, "bridge-subnet")
        assert "192.168.200.1" in host.shell("ip addr show nocloud").stdout
    finally:
        host.shell("ip link delete lan; nocloud net down").ok()
        shutil.copy(PROGRAM.parent / "etc/nocloud_net.conf", host.cloud.home / "prefix/etc")
