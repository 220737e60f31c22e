"""`make`, `make install`, `make uninstall`: what they put where, what they keep, and that nothing is left."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import NOBODY, PROGRAM, ROOT, Cloud, Result, clean_environment, replace_program
from test_zipapp import as_nobody, builder, needs_root

import nocloud

COMMANDS = {each.alias for each in nocloud.COMMANDS.values() if each.alias}
NET_CONF, CATALOGUE = "etc/nocloud_net.conf", "etc/nocloud_templates.conf"


class Checkout:
    """A copy of the sources, to install from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder.parent / "cache"  # of bytecode
        (folder / "tests").mkdir(parents=True)
        for name in ("nocloud.py", "build.sh", "pyproject.toml", "Makefile", "tests/install.sh"):
            shutil.copy(ROOT / name, folder / name)
        for name in ("etc", "systemd"):
            if (ROOT / name).exists():
                shutil.copytree(ROOT / name, folder / name)

    def make(self, *words: object, before: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Result:
        argv = [*before, "make", "--no-print-directory", *map(str, words)]
        done = subprocess.run(
            argv,
            cwd=self.folder,
            env={**clean_environment(), "PYTHON": builder(), "XDG_CACHE_HOME": str(self.cache), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Result(argv, done.returncode, done.stdout, done.stderr)

    def change(self, name: str, line: str) -> None:
        """Another version of a file, newer than what was built of it."""
        with (self.folder / name).open("a") as file:
            file.write(f"{line}\n")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("checkout") / "nocloud")
    checkout.make("build").ok()
    return checkout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """DESTDIR; it is made by the installation."""
    return tmp_path / "root"


SYSTEM_UNITS = {
    "nocloud-bridge.service", "nocloud-dnsmasq.service", "nocloud-dnsmasq-reload.path",
    "nocloud-dnsmasq-reload.service", "nocloud@.service",
}  # fmt: skip


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.exists() else set()


def test_what_is_installed(built: Checkout, root: Path) -> None:
    done = built.make("install", f"DESTDIR={root}").ok()
    assert f"nocloud {nocloud.__version__} is in {root}/usr/local" in done.stderr
    prefix = root / "usr/local"
    assert {path.name for path in (prefix / "bin").iterdir()} == {"nocloud", *COMMANDS}
    for path in (path for path in root.rglob("*") if not path.is_symlink()):
        program = path.parent.name == "bin"
        assert path.stat().st_mode & 0o7777 == (0o755 if path.is_dir() or program else 0o644), path
    assert (prefix / "bin/nocloud").read_bytes() == (built.folder / "nocloud.pyz").read_bytes()
    for name in (NET_CONF, CATALOGUE):
        assert (prefix / name).read_bytes() == (built.folder / name).read_bytes()
    named = {"man/man1": ".1", "bash-completion/completions": "", "fish/vendor_completions.d": ".fish"}
    for folder, end in [(prefix / "share" / name, end) for name, end in named.items()]:
        assert {path.name for path in folder.iterdir()} == {f"{name}{end}" for name in ("nocloud", *COMMANDS)}
        assert all(path.resolve().name == f"nocloud{end}" for path in folder.iterdir())
    assert (prefix / "share/zsh/site-functions/_nocloud").read_text().startswith("#compdef nocloud ")
    units = prefix / "lib/systemd"
    assert {path.name for path in (units / "system").iterdir()} == SYSTEM_UNITS
    assert {path.name for path in (units / "user").iterdir()} == {"nocloud@.service"}
    assert "\nExecStart=/usr/local/bin/nocloud run -r %i\n" in (units / "user/nocloud@.service").read_text()
    assert not [path for path in units.rglob("*.*") if "@BINDIR@" in path.read_text()]
    assert "nocloud-dnsmasq" in (prefix / "lib/sysusers.d/nocloud.conf").read_text()
    assert {path.name for path in (ROOT / "systemd").iterdir()} == {*SYSTEM_UNITS, "nocloud-sysusers.conf"}
    assert set(json.loads((prefix / nocloud.INSTALL_RECORD).read_text())["files"]) == {
        f"/{path}" for path in files(root) if not (root / path).is_dir() and not path.endswith("installed.json")
    }


def test_the_commands_run_with_the_settings_of_the_installation(built: Checkout, root: Path, tmp_path: Path) -> None:
    built.make("install", f"DESTDIR={root}", "PREFIX=/opt/nocloud").ok()
    prefix = root / "opt/nocloud"
    assert {path.name for path in (root / "etc/systemd/system").iterdir()} == SYSTEM_UNITS
    for name in ("nocloud", *COMMANDS):
        assert os.readlink(prefix / "bin" / name) == "nocloud" if name in COMMANDS else True
        shown = subprocess.run([prefix / "bin" / name, "-v"], capture_output=True, text=True, check=False)
        assert (shown.returncode, shown.stdout) == (0, f"nocloud {nocloud.__version__}\n")
    with (prefix / NET_CONF).open("a") as file:
        file.write("vmCount=77\n")
    env = {**clean_environment(), "HOME": str(tmp_path)}
    shown = subprocess.run([prefix / "bin/vminstantiate", "-h"], env=env, capture_output=True, text=True, check=True)
    assert "[77]" in shown.stdout


def test_twice_is_harmless(built: Checkout, root: Path) -> None:
    built.make("install", f"DESTDIR={root}").ok()
    before = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in root.rglob("*") if not path.is_dir()}
    record = root / "usr/local" / nocloud.INSTALL_RECORD
    text = record.read_text()
    assert "kept" not in built.make("install", f"DESTDIR={root}").ok().stderr
    assert record.read_text() == text
    after = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in root.rglob("*") if not path.is_dir()}
    assert {path for path in before if before[path] != after.get(path)} <= {record}
    assert set(before) == set(after)


def test_changed_configuration_is_kept(tmp_path: Path, root: Path) -> None:
    checkout = Checkout(tmp_path / "nocloud")
    conf, catalogue = root / "usr/local" / NET_CONF, root / "usr/local" / CATALOGUE
    checkout.make("install", f"DESTDIR={root}").ok()
    conf.write_text("bridgeInterface=mine\n")
    # the same version again: it is what the user has changed already
    assert f"kept: {conf}, which was changed\n" in checkout.make("install", f"DESTDIR={root}").ok().stderr
    assert conf.read_text() == "bridgeInterface=mine\n" and not conf.with_suffix(".conf.new").exists()
    # another version: beside it, once; what wasn't changed is replaced
    checkout.change(NET_CONF, "# more")
    checkout.change(CATALOGUE, "# more")
    done = checkout.make("install", f"DESTDIR={root}").ok()
    assert f"kept: {conf}, which was changed; the new version is {conf}.new" in done.stderr
    new = conf.with_suffix(".conf.new")
    assert conf.read_text() == "bridgeInterface=mine\n" and new.read_text().endswith("# more\n")
    assert catalogue.read_text().endswith("# more\n") and not catalogue.with_suffix(".conf.new").exists()
    new.unlink()
    assert "new version" not in checkout.make("install", f"DESTDIR={root}").ok().stderr
    assert not new.exists()
    # taken over: it is no change any more
    conf.write_bytes((checkout.folder / NET_CONF).read_bytes())
    assert "kept" not in checkout.make("install", f"DESTDIR={root}").ok().stderr
    assert "kept" not in checkout.make("uninstall", f"DESTDIR={root}").ok().stderr
    assert not root.exists()


def test_uninstall_keeps_what_was_changed(built: Checkout, root: Path) -> None:
    built.make("install", f"DESTDIR={root}").ok()
    conf = root / "usr/local" / NET_CONF
    conf.write_text("bridgeInterface=mine\n")
    assert f"kept: {conf}, which was changed" in built.make("uninstall", f"DESTDIR={root}").ok().stderr
    assert files(root) == {"usr", "usr/local", "usr/local/etc", f"usr/local/{NET_CONF}"}
    # and so does the next installation
    assert f"kept: {conf}, which was changed; the new" in built.make("install", f"DESTDIR={root}").ok().stderr
    assert conf.read_text() == "bridgeInterface=mine\n"
    conf.unlink()
    built.make("uninstall", f"DESTDIR={root}").ok()
    assert files(root) == {"usr", "usr/local", "usr/local/etc"}  # which weren't made by the second installation


def test_uninstall_leaves_nothing(built: Checkout, root: Path) -> None:
    others = root / "usr/local/bin/other"
    others.parent.mkdir(parents=True)
    others.write_text("someone else's")
    built.make("install", f"DESTDIR={root}").ok()
    assert "no longer" in built.make("uninstall", f"DESTDIR={root}").ok().stderr
    assert files(root) == {"usr", "usr/local", "usr/local/bin", "usr/local/bin/other"}
    assert "nothing is installed" in built.make("uninstall", f"DESTDIR={root}").ok().stderr
    built.make("install", f"DESTDIR={root}2").ok()
    done = subprocess.run(  # without the checkout, by what was installed itself
        [f"{root}2/usr/local/bin/nocloud", "setup", "--undo", f"--destdir={root}2", "--prefix=/usr/local"], check=False
    )
    assert done.returncode == 0 and not Path(f"{root}2").exists()


def test_what_is_in_the_way_is_named_and_nothing_changes(built: Checkout, root: Path) -> None:
    folder = root / "usr/local/bin"
    folder.mkdir(parents=True)
    (folder / "vmrun").write_text("#!/bin/bash\n")
    (folder / "vmssh").symlink_to("/opt/other/vmssh")
    (folder / "vm").mkdir()
    before = files(root)
    done = built.make("install", f"DESTDIR={root}")
    assert done.status != 0 and "is in" not in done.stderr
    told = done.stderr.splitlines()[0]
    assert re.match("nocloud setup: in the way", told)
    assert all(f"{folder}/{name}" in told for name in ("vm", "vmrun", "vmssh")) and "vmstop" not in told
    assert files(root) == before
    for name in ("vmrun", "vmssh"):
        (folder / name).unlink()
    (folder / "vm").rmdir()
    (folder / "vmrun").symlink_to(built.folder / "nocloud.pyz")  # made by `nocloud links`
    built.make("install", f"DESTDIR={root}").ok()
    assert os.readlink(folder / "vmrun") == "nocloud"


def test_a_new_version_takes_away_what_it_no_longer_has(built: Checkout, root: Path) -> None:
    built.make("install", f"DESTDIR={root}").ok()
    record = root / "usr/local" / nocloud.INSTALL_RECORD
    known = json.loads(record.read_text())
    known["files"]["/usr/local/bin/vmold"] = ["link nocloud"]
    record.write_text(json.dumps(known))
    old = root / "usr/local/bin/vmold"
    old.symlink_to("nocloud")
    built.make("install", f"DESTDIR={root}").ok()
    assert not old.is_symlink() and "vmold" not in record.read_text()


def test_killed_at_any_instant(built: Checkout, root: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    instants = random.Random(seed)
    argv = [builder(), "-IS", str(built.folder / "nocloud.pyz"), "setup", f"--destdir={root}", "--prefix=/usr/local"]
    started = time.monotonic()
    subprocess.run(argv, capture_output=True, check=True)
    took = time.monotonic() - started
    for number in range(8):
        child = subprocess.Popen([*argv, "--undo"] if number % 2 == 0 else argv, stderr=subprocess.DEVNULL)
        time.sleep(instants.uniform(0.5, 1.1) * took)  # the instant itself is what is tried
        child.send_signal(signal.SIGKILL)
        child.wait()
        subprocess.run(argv, capture_output=True, check=True)
        assert {path.name for path in (root / "usr/local/bin").iterdir()} == {"nocloud", *COMMANDS}
    subprocess.run([*argv, "--undo"], capture_output=True, check=True)
    assert not [path for path in root.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("prefix", ["usr/local", "/usr/../x", "/with space", "/a;b", "/", "/a/%n"])
def test_a_bad_prefix(built: Checkout, root: Path, prefix: str) -> None:
    done = built.make("install", f"DESTDIR={root}", f"PREFIX={prefix}")
    assert done.status != 0 and f"nocloud setup: PREFIX={prefix}: expected" in done.stderr
    assert not root.exists()


@pytest.mark.parametrize("spoil", ["{", "[]", '{"files": {}}', '{"files": [], "folders": 1, "host": {}}'])
def test_a_damaged_record_is_named(built: Checkout, root: Path, spoil: str) -> None:
    built.make("install", f"DESTDIR={root}").ok()
    record = root / "usr/local" / nocloud.INSTALL_RECORD
    record.write_text(spoil)
    for goal in ("install", "uninstall"):
        done = built.make(goal, f"DESTDIR={root}")
        assert done.status != 0 and f"{record}: is damaged" in done.stderr, done
        assert (root / "usr/local/bin/nocloud").exists()


def test_a_record_that_others_may_write_is_not_used(built: Checkout, root: Path) -> None:
    built.make("install", f"DESTDIR={root}").ok()
    record = root / "usr/local" / nocloud.INSTALL_RECORD
    record.chmod(0o666)
    done = built.make("uninstall", f"DESTDIR={root}")
    assert done.status != 0 and "others may write" in done.stderr
    assert (root / "usr/local/bin/nocloud").exists()


# Who does it #########################################################################################


def test_the_default_goal(public_folder: Path) -> None:
    """Root installs, everybody else builds."""
    checkout = Checkout(public_folder / "nocloud")
    goals = {True: "setup --prefix='/usr/local'", False: "./build.sh"}
    assert goals[os.geteuid() == 0] in checkout.make("-n").ok().stdout
    if os.geteuid() == 0:
        shown = checkout.make("-n", "PYTHON=/usr/bin/python3", before=as_nobody).ok().stdout
        assert "setup" not in shown and goals[False] in shown


def test_a_group_from_the_boot_on(blank: Cloud, tmp_path: Path) -> None:
    """By the user's own systemd, of a program that isn't installed; systemctl is one that writes down its words."""
    blank.run("vminstantiate", "-n", "blank", "-g", "Shop", "-o", "name=web").ok()
    blank.run("vminstantiate", "-n", "blank", "-g", "two", "-o", "name=db").ok()
    wants = blank.home / "config/systemd/user/default.target.wants"
    unit = wants.parent / "nocloud@.service"
    path = replace_program(
        blank.home / "bin",
        "systemctl",
        'echo "$@" >>"$HOME/said"\n'
        f"for unit; do :; done; link={wants}/$unit.service; mkdir -p {wants}\n"
        'case "$*" in *cat*) exit 1 ;; *enable*@*) touch "$link" ;; *disable*) rm "$link" || exit ;; esac',
    )
    env = {"PATH": path}
    del blank.env["NOCLOUD_NOKVM"]
    (blank.home / ".nocloud.conf").write_text("vmAccel=tcg\n")
    done = blank.run("enable", "shop", "--user", env=env).ok()
    assert done.stderr.splitlines()[0] == "Shop: runs from each boot on and now"
    assert "is logged in, until: loginctl enable-linger " in done.stderr
    assert "NOCLOUD_vmBaseDir of this shell is not known there" in done.stderr
    text = unit.read_text()
    program = re.findall("^ExecStart=(.*) run -r %i$", text, re.M)[0].split()
    assert program[1:] == ["-X", "utf8", "-IS", str(PROGRAM)] and "@BINDIR@" not in text
    assert blank.execute([*program, "-v"]).ok().stdout == f"nocloud {nocloud.__version__}\n"
    if shutil.which("systemd-analyze"):
        (tmp_path / "nocloud@x.service").write_text(text)
        assert blank.execute(["systemd-analyze", "verify", "--man=no", tmp_path / "nocloud@x.service"]).stderr == ""
    blank.run("enable", "two", "--user", env=env).ok()
    blank.run("disable", "SHOP", "--user", env=env).quiet()
    assert unit.exists()
    blank.run("disable", "two", "--user", env=env).quiet()
    assert not unit.exists()
    said = (blank.home / "said").read_text().splitlines()
    assert said[:3] == ["--user daemon-reload", "--user cat nocloud@.service", "--user daemon-reload"]
    assert said[3] == "--user enable --now nocloud@Shop"
    assert said[-2:] == ["--user disable --now nocloud@two", "--user daemon-reload"]
    blank.run("disable", "two", "--user", env=env).fails(1, "systemctl disable --now nocloud@two: ")
    blank.run("enable", "three", "--user", env=env).says(1, "three: no such group", "vmrunning -a lists them")


@needs_root
def test_an_ordinary_user_is_told_and_nothing_changes(public_folder: Path) -> None:
    checkout = Checkout(public_folder / "nocloud")
    before = files(public_folder)
    for goal in ("install", "uninstall"):
        words = (f"PREFIX={public_folder}/there", "PYTHON=/usr/bin/python3")
        done = checkout.make(goal, *words, before=as_nobody)
        assert done.status != 0 and "needs root; nothing was changed" in done.stderr and "sudo" in done.stderr
    assert files(public_folder) == before


@needs_root
def test_under_sudo_nothing_in_the_checkout_is_roots(public_folder: Path) -> None:
    """Built as the owner of the checkout, whoever SUDO_UID says; what is there and up to date isn't built again."""
    checkout = Checkout(public_folder / "nocloud")
    python = builder()
    if subprocess.run([*as_nobody, python, "-I", "-c", "import shiv"], capture_output=True, check=False).returncode:
        python = "/usr/bin/python3"
    root = public_folder / "root"
    for path in [checkout.folder, *checkout.folder.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    sudo = {"SUDO_UID": "1", "SUDO_GID": "1", "SUDO_USER": "daemon", "PYTHON": python, "HOME": "/root"}
    for _ in range(2):
        done = checkout.make("install", f"DESTDIR={root}", env=sudo).ok()
        assert not [path for path in checkout.folder.rglob("*") if path.lstat().st_uid != NOBODY]
    assert "build.sh" not in done.stdout
    assert {path.lstat().st_uid for path in root.rglob("*")} == {0}
    checkout.make("uninstall", f"DESTDIR={root}", env=sudo).ok()
    assert not root.exists()
    assert not [path for path in checkout.folder.rglob("*") if path.lstat().st_uid != NOBODY]
