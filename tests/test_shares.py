"""Folders of this host that guests mount."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support import READY, Cloud, eventually

import nocloud

EXPECTED = "HOSTDIR:GUESTDIR[:rw], plain paths, at most 8"


def test_a_description_shares_what_is_beside_it(blank: Cloud) -> None:
    """Whoever wrote it: a relative path counts from its folder, and nothing else of this host is opened by it."""
    folder, other = blank.home / "project", blank.home / "other"
    (folder / "src").mkdir(parents=True)
    other.mkdir()
    (folder / "link").symlink_to(other)
    file = folder / "web"
    for text in ("src:/src", f"{folder}/src:/src:rw", ".:/src"):
        file.write_text(f"blank:1:web:share={text}\n")
        blank.run("vminstantiate", "-f", file, "--dry-run").ok()
        blank.run("vminstantiate", "-f", "web", "--dry-run", cwd=folder).ok()
    for text in ("link", "../other", str(other)):
        file.write_text(f"\nblank:1:web:share=src:/src,{text}:/other\n")
        denied = f"share={other}: it is not below the file's own folder"
        for name in ("vminstantiate", "vmrun"):
            blank.run(name, "-f", file).says(2, f"{file}:2: {denied}", f"--allow-share {other} allows it")
        blank.run("vminstantiate", "-f", file, "--dry-run", "--allow-share", other).ok()
    text = file.read_text().replace("src:/src,", "")
    blank.run("vminstantiate", "-f", "-", "-g", "web", "--dry-run", input=text, cwd=folder).fails(2, denied)
    blank.run("vminstantiate", "-n", "blank", "-o", "share=other:/other", "--dry-run").ok()


def test_what_no_guest_may_see(blank: Cloud) -> None:
    home = blank.home
    for name in ("config/nocloud", ".ssh", ".gnupg", "vms/group", "free"):
        (home / name).mkdir(parents=True, exist_ok=True)
    (home / "way").symlink_to(home / ".ssh")
    why = {".ssh": ".ssh", "way": ".ssh", ".gnupg": ".gnupg", "config": "config/nocloud", "vms/group": "vms"}
    for name, secret in why.items():
        said = blank.run("vminstantiate", "-n", "blank", "-o", f"share={home / name}:/x", "--dry-run")
        said.says(2, f"share={(home / name).resolve()}: no guest may get at {home / secret}", "share another folder")
    for name in ("/", str(home), f"{home}/.."):
        said = blank.run("vminstantiate", "-n", "blank", "-o", f"share={name}:/x", "--dry-run")
        said.fails(2, "no guest may get at" if os.access(name, os.W_OK) else "it is ")
    blank.run("vminstantiate", "-n", "blank", "-o", f"share={home}/none:/x").says(
        1, f"share={home}/none: no such folder", f"mkdir -p {home}/none"
    )
    for given, value in (("share=:/x", ":/x"), ("share=", ""), ("share", "")):
        blank.run("vminstantiate", "-n", "blank", "-o", given).says(2, f"-o: share={value}: expected {EXPECTED}")
    foreign = "/proc/1" if os.geteuid() else f"{home}/free"
    if not os.geteuid():
        os.chown(foreign, 65534, 65534)
    blank.run("vminstantiate", "-n", "blank", "-o", f"share={foreign}:/x").fails(2, f"share={foreign}: it is ", "'s")


def fake_daemon(cloud: Cloud, text: str) -> None:
    path = cloud.home / "virtiofsd"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    cloud.env["NOCLOUD_vmVirtiofsd"] = str(path)


def chosen(cloud: Cloud, login: str) -> list[str]:
    code = "print(*sum(nocloud.choose_virtiofsd(nocloud.load_config(), sys.argv[1]), []), sep='\\n')"
    return cloud.script(code, login).ok().lines


def test_a_daemon_that_translates_ids(cloud: Cloud) -> None:
    fake_daemon(cloud, "echo '      --translate-uid <TRANSLATE_UID>'")
    for login, uid in (("root", 0), ("admin", 1000)):
        argv = chosen(cloud, login)
        assert argv[0] == "unshare" and "--map-root-user" in argv and "--map-groups=auto" not in argv
        ids = [word for word in argv if word.startswith("--translate")]
        assert ids == [
            f"--translate-{kind}={rule}"
            for kind in ("uid", "gid")
            for rule in (f"host:0:{uid}:1", "squash-guest:0:0:4294967295")
        ]


def test_a_daemon_that_translates_none(blank: Cloud) -> None:
    fake_daemon(blank, "echo setgroups failed >&2; exit 1")
    argv = chosen(blank, "root")
    assert ("--map-groups=auto" in argv) == (os.geteuid() != 0) == ("setpriv" not in argv)
    with (blank.base / "templates/blank/blank.conf").open("a") as conf:
        conf.write("vmUser=admin\n")
    (blank.home / "src").mkdir()
    blank.run("vminstantiate", "-n", "blank", "-o", "share=src:/src").says(
        1,
        f"share=: by {blank.home}/virtiofsd your files are root's in the guest, and its vmUser is admin",
        "set vmVirtiofsd to a virtiofsd 1.13 or newer, which translates ids",
    )
    blank.env["NOCLOUD_vmVirtiofsd"] = "/nonexistent/virtiofsd"
    blank.run("vminstantiate", "-n", "blank", "-o", "share=src:/src").fails(127, "virtiofsd: not found", "install")


def test_a_users_daemon_needs_other_gids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it translates none: unshare(1) calls newgidmap."""
    there = {name: name for name in ("virtiofsd", "newgidmap")}
    monkeypatch.setenv("NOCLOUD_vmVirtiofsd", "virtiofsd")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(nocloud, "find_program", lambda name: there.get(name, ""))
    monkeypatch.setattr(nocloud, "run", lambda argv, **how: subprocess.CompletedProcess(argv, 0, ""))
    config = nocloud.load_config()
    assert "--map-groups=auto" in nocloud.choose_virtiofsd(config, "root")[0]
    del there["newgidmap"]
    with pytest.raises(nocloud.MissingProgram, match="newgidmap: not found"):
        nocloud.choose_virtiofsd(config, "root")
    assert [nocloud.package_of("newgidmap", column) for column in range(3)] == ["uidmap", "shadow-utils", "shadow"]


def test_a_daemon_that_ends(blank: Cloud) -> None:
    """What it says is the error, and nothing is left."""
    (blank.home / "src").mkdir()
    asked = blank.home / "asked"
    fake_daemon(blank, f'case $1 in --help) echo >>{asked};; *) echo "no such luck"; exit 1;; esac')
    failed = blank.run("vminstantiate", "-n", "blank", "-o", "share=src:/src,src:/other")
    assert failed.status == 1 and "qemu did not start: no such luck" in failed.stderr, repr(failed)
    assert len(asked.read_text().splitlines()) == 2  # before VMs are made, and at the start
    assert not blank.groups()


def test_the_folder_is_the_one_that_was_checked(tmp_path: Path) -> None:
    script, other = nocloud.need_packaged("share.sh"), tmp_path / "other"
    other.mkdir()
    for folder, cwd in ((tmp_path, other), (Path("/proc/1/task"), Path("/proc/1/task"))):
        if folder == tmp_path or os.geteuid():
            done = subprocess.run(
                ["sh", "-c", script, "sh", folder, "rw", "true"], cwd=cwd, capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stderr) == (1, f"{folder} is not the folder that it was\n")


@pytest.fixture
def guest(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """Runs shares.sh for these SHARES as in a guest whose /etc, and /proc with what is mounted, are in this folder."""
    for name in ("etc", "proc", "bin", "mnt"):
        (tmp_path / name).mkdir()
    mounts = tmp_path / "proc/mounts"
    (tmp_path / "etc/fstab").write_text(
        "/dev/vda1 / ext4 rw 0 1\nshare7 /gone virtiofs ro,nofail 0 0\n/a\\040b /swap none swap sw"
    )
    mounts.write_text("/dev/vda1 / ext4 rw 0 0\n")
    scripts = {
        "mount": f'echo "$@" >>{tmp_path}/calls; echo "$5 $6 virtiofs $4,relatime 0 0" >>{mounts}',
        "umount": f'echo "umount $@" >>{tmp_path}/calls; sed -i "\\| $1 |d" {mounts}',
    }
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n[ $# = {6 if name == 'mount' else 1} ] || exit 9\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def run(shares: str, before: str = "") -> subprocess.Popen[bytes]:
        script = before + nocloud.guest_script("shares.sh", SHARES=shares)
        for place in ("/etc", "/proc"):
            script = script.replace(place, f"{tmp_path}{place}")
        with (tmp_path / "said").open("a") as said:
            return subprocess.Popen(["sh", "-c", script], env=os.environ | path, stderr=said)

    return run


def test_what_a_guest_mounts(guest: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Only what it hasn't yet; what isn't asked for any more goes."""
    fstab, calls, a, b = tmp_path / "etc/fstab", tmp_path / "calls", tmp_path / "mnt/a", tmp_path / "mnt/b"
    fstab.chmod(0o640)
    own = "/dev/vda1 / ext4 rw 0 1\n/a\\040b /swap none swap sw\n"
    entries = f"share0 {a} virtiofs ro,nofail 0 0\nshare1 {b} virtiofs rw,nofail 0 0\n"
    for shares, text, called in (
        (f"share0 {a} ro\nshare1 {b} rw", own + entries, ["ro share0", "rw share1"]),
        (f"share0 {a} ro\nshare1 {b} rw", own + entries, []),
        (f"share0 {a} rw", f"{own}share0 {a} virtiofs rw,nofail 0 0\n", [f"umount {a}", f"umount {b}", "rw share0"]),
        ("", own, [f"umount {a}"]),
    ):
        calls.write_text("")
        assert (guest(shares).wait(60), (tmp_path / "said").read_text(), fstab.read_text()) == (0, "", text)
        said = [line.removeprefix("-t virtiofs -o ") for line in calls.read_text().splitlines()]
        assert [line if "umount" in line else line.rpartition(" ")[0] for line in said] == called
    assert fstab.stat().st_mode & 0o777 == 0o640 and os.listdir(tmp_path / "etc") == ["fstab"]


@pytest.mark.long
def test_guests_that_mount_twice_at_once(guest: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    shares, fstab = f"share0 {tmp_path}/mnt/a ro", tmp_path / "etc/fstab"
    for number in range(50):
        assert [each.wait(60) for each in [guest(shares), guest(shares)]] == [0, 0]
        lines = fstab.read_text().splitlines()
        assert [line.split()[0] for line in lines] == ["/dev/vda1", "/a\\040b", "share0"], number
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_guest_whose_disk_is_full_keeps_its_fstab(
    guest: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    before = (tmp_path / "etc/fstab").read_text()
    assert guest("", "ulimit -f 0\n").wait(60)
    assert (tmp_path / "etc/fstab").read_text() == before


LOGIN = """
def mount_shares(wait):
    raise nocloud.Error("no virtiofs")
nocloud.wait_ssh = nocloud.pin_host_key = nocloud.find_init_kind = lambda wait: None
nocloud.configure = lambda *given, **options: None
nocloud.mount_shares, nocloud.clean_at_shutdown = mount_shares, lambda cloud, vm: print("cleans itself")
with nocloud.Cloud(nocloud.load_config()) as cloud:
    vm = cloud.tree.need("blank")
    vm.write_conf({"vmInit": "ssh"})
    nocloud.wait_login(cloud, vm, fresh=True)
"""


def test_a_template_that_cannot_mount_cleans_itself(blank: Cloud) -> None:
    said = blank.script(LOGIN).ok()
    assert said.stdout == "cleans itself\n" and "no virtiofs" in said.stderr


CONFIGURED = """
nocloud.spawn = lambda argv, **options: print(*argv[argv.index("configure"):])
with nocloud.Cloud(nocloud.load_config()) as cloud:
    vm = cloud.tree.need("blank")
    for kind in ("ssh", "cloud-init", "none"):
        for shares in ("", "/a:/a"):
            vm.write_conf({"vmInit": kind, "vmShares": shares})
            print(kind, shares)
            nocloud.configure_later(cloud, [vm])
"""


def test_who_has_work_left_when_nobody_waits(blank: Cloud) -> None:
    work = "configure templates/blank"
    lines = ["ssh ", work, "ssh /a:/a", work, "cloud-init ", "cloud-init /a:/a", work, "none ", "none /a:/a"]
    assert blank.script(CONFIGURED).ok().lines == lines


def daemons(cloud: Cloud) -> list[int]:
    return [pid for pid, words in cloud.processes().items() if os.path.basename(words.split()[0]) == "virtiofsd"]


def test_daemons_end_with_their_vm(blank: Cloud) -> None:
    """However it ends; its command line is as any other's but for what the folders need."""
    (blank.home / "src").mkdir()
    blank.run("vminstantiate", "-n", "blank", "-o", "name=a;share=src:/src,src:/other:rw").ok()
    assert len(daemons(blank)) == 2
    os.kill(blank.qemu("group/default/a00"), signal.SIGKILL)
    eventually(lambda: not daemons(blank), "the daemons end", 10)
    blank.start("a00").ok()
    assert len(daemons(blank)) == 2
    assert not list(blank.folder("group/default/a00").glob("share*"))
    blank.run("vmstop", "-n", "a00", "--kill").ok()
    eventually(lambda: not daemons(blank), "the daemons end", 10)
    (blank.home / "src").rmdir()
    blank.start("a00").fails(1, f"share={blank.home}/src: no such folder")


def numbers(path: Path) -> tuple[int, int, str]:
    info = path.lstat()
    return info.st_uid, info.st_gid, oct(info.st_mode & 0o7777)


PROBE = """
cd /src
stat -c '%u %g %a' file link; readlink link; cat link
echo made >made; chmod 640 made; ln -s made to-made; mkdir -p deep/er
mknod disk b 254 0 2>&1
mount -o remount,rw /ro; { echo x >/ro/x; rm /ro/file; chmod 777 /ro/file; } 2>&1
cd /src/..; pwd; ln -s / /src/out; cat /src/out/etc/os-release | head -n 1; ls /src/../../../src/file
"""


def test_a_guest_at_work(tiny: Cloud) -> None:
    src, read_only = tiny.home / "src", tiny.home / "read only"
    for folder in (src, read_only):
        folder.mkdir()
        (folder / "file").write_text("hello\n")
    (src / "file").chmod(0o604)
    (src / "link").symlink_to("file")
    tiny.run("vminstantiate", "-n", "tiny", "-o", f"name=web;share={src}:/src:rw,{read_only}:/ro", "-w", READY).ok()
    said = tiny.ssh("web00", PROBE).ok().lines
    assert said[:4] == ["0 0 604", "0 0 777", "file", "hello"]
    assert said[4].endswith("Operation not permitted"), said
    assert len(said[5:8]) == sum("Read-only file system" in line for line in said[5:8]), said
    assert said[8:] == ["/", "ID=tinyguest", "/src/../../../src/file"], said
    assert numbers(src / "made") == (os.geteuid(), os.getegid(), "0o640")
    assert [path.read_text() for path in (src / "made", src / "to-made", read_only / "file")] == ["made\n"] * 2 + [
        "hello\n"
    ]
    assert (src / "deep/er").is_dir() and [path.name for path in read_only.iterdir()] == ["file"]

    tiny.ssh("web00", "cat /src/file").ok()  # it is in the guest's cache now
    (src / "file").write_text("changed\n")
    assert tiny.ssh("web00", "sleep 1; cat /src/file; echo guest >/src/file").ok().lines == ["changed"]
    assert (src / "file").read_text() == "guest\n"

    os.kill(daemons(tiny)[0], signal.SIGKILL)
    lost = "running (without a shared folder)"
    eventually(lambda: lost in tiny.run("vmrunning").stdout, "the lists tell")
    tiny.run("doctor", "vms").ok().stdout.index(f"web00 is {lost}")
    tiny.run("vmstop", "-d", "-n", "web00").ok()
    assert (src / "made").exists() and not daemons(tiny)


@pytest.mark.long
def test_many_files_and_a_large_one(tiny: Cloud) -> None:
    src = tiny.home / "src"
    (src / "host").mkdir(parents=True)
    for number in range(10_000):
        (src / f"host/{number}").write_text(f"{number}\n")
    tiny.run("vminstantiate", "-n", "tiny", "-o", "name=web;share=src:/src:rw", "-w", READY).ok()
    script = "cd /src; find host -type f | wc -l; cat host/* | md5sum; mkdir guest; seq 10000 | (cd guest; xargs touch)"
    count, digest = tiny.ssh("web00", script, timeout=600).ok().lines
    contents = b"".join((src / "host" / name).read_bytes() for name in sorted(os.listdir(src / "host")))
    assert (count, digest.split()[0]) == ("10000", hashlib.md5(contents).hexdigest())
    assert len(os.listdir(src / "guest")) == 10_000
    script = "dd if=/dev/urandom of=/block bs=1M count=1; for i in $(seq 1024); do cat /block; done >/src/large"
    tiny.ssh("web00", script, timeout=600).ok()
    with (src / "large").open("rb") as file:
        block = file.read(1 << 20)
        assert len(block) == 1 << 20 and all(file.read(1 << 20) == block for _ in range(1023)) and not file.read()
    assert tiny.ssh("web00", "cat /src/large | wc -c", timeout=600).ok().stdout == f"{1 << 30}\n"
    (src / "large").unlink()
