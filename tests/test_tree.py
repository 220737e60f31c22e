"""Names, the VM tree, and states asked of locks."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import NOBODY, Cloud, add_blank, replace_program, tree_at
from test_lifecycle import INHERITED

import nocloud

LABEL = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.mark.parametrize("name", ["a", "web00", "Web-1", "0", "x" * 63, "a--b"])
def test_good_names(name: str) -> None:
    for kind in ("VM", "group", "type", "template"):
        assert nocloud.checked_name(kind, name) == name


@pytest.mark.parametrize("name", ["a.b", "a_b", "shop.v2", "a-", "Debian_12.5"])
def test_names_of_groups_only(name: str) -> None:
    for kind in ("group", "type", "template"):
        assert nocloud.checked_name(kind, name) == name
    with pytest.raises(nocloud.UsageError):
        nocloud.checked_name("VM", name)


BAD = {
    "": "empty",
    "../x": "not allowed",
    "..": "'.'",
    ".": "'.'",
    ".hidden": "'.'",
    "-x": "'-'",
    "_x": "'_'",
    "a,b": "','",
    "a/b": "'/'",
    "a b": "' '",
    "a=b": "'='",
    "a:b": "':'",
    "a;b": "';'",
    "a$b": "'$'",
    "a\nb": "'\\n'",
    "a\0b": "'\\x00'",
    "é": "'é'",
    "１": "'１'",
    "a*": "'*'",
    "x" * 64: "63",
    "a\\b": "'\\\\'",
    "~": "'~'",
    "%s": "'%'",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_names_name_the_character(name: str) -> None:
    for kind in ("VM", "group", "type", "template"):
        with pytest.raises(nocloud.UsageError) as raised:
            nocloud.checked_name(kind, name)
        assert BAD[name] in str(raised.value)
        assert raised.value.status == 2


@pytest.mark.parametrize("name", ["templates", "Templates", "all", "ungrouped", "ALL"])
def test_reserved_groups(name: str) -> None:
    with pytest.raises(nocloud.UsageError, match="reserved"):
        nocloud.checked_group(name)


@given(st.text())
def test_no_name_gets_a_path_an_option_or_a_comma_through(name: str) -> None:
    for kind in ("VM", "group"):
        try:
            nocloud.checked_name(kind, name)
        except nocloud.UsageError:
            continue
        assert name[0] in LABEL and set(name) <= set(LABEL + "-" + ("" if kind == "VM" else "._"))
        assert 1 <= len(name) <= 63


# Finding #############################################################################################


@pytest.fixture
def tree(tmp_path: Path) -> nocloud.Tree:
    for vm in (
        "pf/web/web00",
        "pf/web/web01",
        "pf/sql/db00",
        "two/web/web00",
        "two/web/web",
        "two/x/DB00",
        "templates/debian12",
    ):
        add(tmp_path, vm)
    (tmp_path / "pf/web/empty").mkdir()  # no conf: no VM
    (tmp_path / "pf/web/.new-web02").mkdir()
    (tmp_path / "pf/web/.new-web02/web02.conf").write_text("vmName=web02\n")
    (tmp_path / ".net").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    return tree_at(tmp_path)


def add(base: Path, vm: str) -> None:
    (base / vm).mkdir(parents=True)
    name = vm.rpartition("/")[2]
    (base / vm / f"{name}.conf").write_text(f"vmName={name}\n")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("web01", ["pf/web/web01"]),
        ("WEB01", ["pf/web/web01"]),
        ("web00", ["pf/web/web00", "two/web/web00"]),
        ("pf/web00", ["pf/web/web00"]),
        ("two/web/web00", ["two/web/web00"]),
        ("pf/sql/web00", []),
        ("web", ["two/web/web"]),
        ("web0", []),  # a prefix is not a name
        ("db00", ["pf/sql/db00", "two/x/DB00"]),
        ("debian12", ["templates/debian12"]),
        ("templates/debian12", ["templates/debian12"]),
        ("empty", []),
        ("web02", []),
        ("", []),
        ("/", []),
        ("pf/", []),
        ("../pf/web00", []),
        ("pf/../web00", []),
        ("pf/web/..", []),
        ("a/b/c/d", []),
        ("*", []),
    ],
)
def test_find(tree: nocloud.Tree, words: str, found: list[str]) -> None:
    assert [vm.full_name for vm in tree.find(words)] == found


SEVERAL = ": several VMs are called so: "
MISSING: list[tuple[str, str | None, str | None, str, str]] = [
    ("web00", None, None, f"web00{SEVERAL}pf/web/web00, two/web/web00", "name the group too: GROUP/NAME"),
    ("web00", None, "web", f"web00{SEVERAL}pf/web/web00, two/web/web00", "name the group too: GROUP/NAME"),
    ("web02", None, None, "web02: no such VM", "did you mean web01?"),
    ("xyz", None, None, "xyz: no such VM", "vmrunning -a lists them"),
    ("", None, None, ": no such VM", "vmrunning -a lists them"),
    ("web02", "pf", None, "web02: no such VM in pf", "did you mean web01?"),
    ("web00", "pf", "sql", "web00: no such VM in pf/sql", "did you mean pf/web/web00?"),
    ("web00", "nothere", None, "web00: no such VM in nothere", "did you mean pf/web/web00?"),
    ("db01", None, "sql", "db01: no such VM of type sql", "did you mean db00?"),
    ("web01", None, "sql", "web01: no such VM of type sql", "did you mean pf/web/web01?"),
    ("web00", "", None, "web00: no such VM", "did you mean pf/web/web00?"),
    ("debian11", "templates", None, "debian11: no such template", "did you mean debian12?"),
    ("web01", "templates", None, "web01: no such template", nocloud.TEMPLATES_HINT),
    ("10.0.0.9", None, None, "10.0.0.9: no such VM", "vmrunning -a lists them"),
]


@pytest.mark.parametrize(("words", "group", "type", "said", "hint"), MISSING)
def test_a_vm_that_is_not_the_one(
    tree: nocloud.Tree, words: str, group: str | None, type: str | None, said: str, hint: str
) -> None:
    for address_of in (None, lambda vm: "10.0.0.1"):
        with pytest.raises(nocloud.NotFound) as raised:
            tree.need(words, group, type, first=lambda vm: vm.name == "web", address_of=address_of)
        assert (str(raised.value), raised.value.hint) == (said, hint)


@pytest.mark.parametrize(
    ("words", "group", "type", "found"),
    [
        ("web01", None, None, "pf/web/web01"),
        ("WEB00", "two", None, "two/web/web00"),
        ("db00", None, "x", "two/x/DB00"),
        ("two/db00", "two", "x", "two/x/DB00"),
        ("debian12", "templates", None, "templates/debian12"),
        ("db00", None, None, "pf/sql/db00"),  # the one that is preferred
        ("two/web00", None, None, "two/web/web00"),  # preferred is only what fits
        ("10.0.0.2", None, None, "pf/web/web01"),
    ],
)
def test_the_vm_that_is_meant(
    tree: nocloud.Tree, monkeypatch: pytest.MonkeyPatch, words: str, group: str | None, type: str | None, found: str
) -> None:
    monkeypatch.setattr(nocloud.VM, "is_running", lambda vm: vm.group == "pf")
    addresses = {"web00": "10.0.0.1", "web01": "10.0.0.2"}

    def address_of(vm: nocloud.VM) -> str:
        return addresses.get(vm.name, "")

    assert tree.need(words, group, type, first=nocloud.VM.is_running, address_of=address_of).full_name == found


def test_lists_are_sorted_by_group_type_and_name(tree: nocloud.Tree) -> None:
    names = [vm.full_name for vm in tree.vms()]
    clones = ["pf/sql/db00", "pf/web/web00", "pf/web/web01", "two/web/web", "two/web/web00", "two/x/DB00"]
    assert names == [*clones, "templates/debian12"]
    assert [vm.name for vm in tree.vms("pf", "web")] == ["web00", "web01"]
    assert [vm.name for vm in tree.vms("nothere")] == []
    assert tree.groups() == ["pf", "two"]
    assert [vm.name for vm in tree.unfinished()] == ["web02"]


def test_an_empty_tree(tmp_path: Path) -> None:
    tree = tree_at(tmp_path / "nothing")
    assert list(tree.vms()) == [] and tree.find("x") == [] and tree.groups() == []


def test_disks_of_every_form_of_conf(tmp_path: Path) -> None:
    """Relative to vmBaseDir, to the VM's own folder, or absolute."""
    add(tmp_path, "pf/web/web00")
    folder = tmp_path / "pf/web/web00"
    (folder / "web00_1.img").write_text("")
    vm = nocloud.VM(tree_at(tmp_path), "pf", "web", "web00")
    (folder / "web00.conf").write_text("vmDisk=pf/web/web00/web00_0.img\nvmExtraDisk='web00_1.img, /dev/null'\n")
    assert vm.disks() == [f"{folder}/web00_0.img", f"{folder}/web00_1.img", "/dev/null"]


def test_a_conf_keeps_what_we_do_not_know(tmp_path: Path) -> None:
    add(tmp_path, "pf/web/web00")
    vm = nocloud.VM(tree_at(tmp_path), "pf", "web", "web00")
    conf = Path(vm.conf_file)
    conf.write_text('#!/bin/bash\nvmName=web00\n# mine\nmyOwn="a b"\nvmMem=64 # was 32\n')
    vm.write_conf({"vmMem": "128", "vmTemplate": "x y"})
    assert conf.read_text() == "#!/bin/bash\nvmName=web00\n# mine\nmyOwn=\"a b\"\nvmMem=128\nvmTemplate='x y'\n"
    assert vm.conf["myOwn"] == "a b" and vm.get("vmMem") == "128" and vm.get("vmCpu") == "2"


# A VM's settings #####################################################################################


def vm_of(base: Path, conf: str, **config: str) -> nocloud.VM:
    """A VM with this conf, in a tree of this configuration."""
    tree = nocloud.Tree(nocloud.Config({"vmBaseDir": str(base), **config}))
    vm = nocloud.VM(tree, "pf", "web", "web00")
    os.makedirs(vm.folder, exist_ok=True)
    Path(vm.conf_file).write_text(conf)
    return vm


def test_what_a_conf_does_not_say_the_configuration_does(tmp_path: Path) -> None:
    """Of every key that both may have, and of no other."""
    for setting in nocloud.SETTINGS:
        given = {"vmMem": "99", "vmCpu": "7", "vmUser": "ann", "vmAccel": "tcg", "vmNetwork": "private"}
        value = given.get(setting.key, "3")
        vm = vm_of(tmp_path, "vmName=web00\n", **({} if setting.key == "vmBaseDir" else {setting.key: value}))
        if setting.where == "both":
            assert vm.get(setting.key) == value
        elif setting.key != "vmName":
            assert vm.get(setting.key) == setting.default
    vm = vm_of(tmp_path, "vmUser=bob\nvmMem=64\nvmExtraOpts=\n", vmUser="ann", vmMem="99", vmExtraOpts="-x")
    assert (vm.get("vmUser"), vm.number("vmMem"), vm.get("vmExtraOpts")) == ("bob", 64, "-x")
    vm = vm_of(tmp_path, "vmName=web00\n")
    assert (vm.get("vmUser"), vm.get("vmAccel"), vm.number("vmCpu")) == ("root", "auto", 2)


@pytest.mark.parametrize(
    ("value", "on"),
    [
        ("yes", True),
        ("no", False),
        ("1", True),
        ("0", False),
        ("True", True),
        ("off", False),
        ("", False),
        ("ON", True),
    ],
)
def test_a_switch_is_written_in_many_ways(tmp_path: Path, value: str, on: bool) -> None:
    for said in (vm_of(tmp_path, f"vmGui={value}\n").get("vmGui"), value):
        assert nocloud.yes_no(said) == ("yes" if on else "no")


def test_what_is_inherited(tmp_path: Path) -> None:
    """The keys that test_lifecycle has a value for, where the conf has them; not the configuration's."""
    others = "vmName=web00\nvmQemu=/old\nvmUuid=\nvmGui=1\nvmNetwork=private\nmine=1\n"
    vm = vm_of(tmp_path, others + "".join(f"{key}={value}\n" for key, value in INHERITED.items()))
    assert vm.inherited() == INHERITED
    assert vm_of(tmp_path, "vmName=web00\nvmExtraOpts=\n", vmUser="ann", vmAccel="tcg").inherited() == {}


def test_auto_in_a_conf_says_nothing(tmp_path: Path) -> None:
    assert vm_of(tmp_path, "vmAccel=auto\n", vmAccel="tcg").get("vmAccel") == "tcg"
    assert vm_of(tmp_path, "vmAccel=kvm\n", vmAccel="tcg").get("vmAccel") == "kvm"
    assert vm_of(tmp_path, "vmInit=auto\n").get("vmInit") == "auto"  # only confs have that


def test_a_group_has_the_network_of_those_that_are_in_it(tmp_path: Path) -> None:
    """One that says nothing, as bash made it, doesn't hide the others."""
    for name, conf in (("a", "vmName=a\n"), ("b", "vmName=b\nvmNetwork=private\n")):
        (tmp_path / "g/t" / name).mkdir(parents=True)
        (tmp_path / "g/t" / name / f"{name}.conf").write_text(conf)
    cloud = nocloud.Cloud(nocloud.Config({"vmBaseDir": str(tmp_path), "vmNetwork": "bridge"}))
    assert nocloud.group_network(cloud, "g") == "private"
    assert nocloud.group_network(cloud, "new") == "bridge"


# States ##############################################################################################

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(300)
"""


def test_a_pidfile_that_nobody_locks_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    assert nocloud.lock_holder(str(path)) == ("stopped", 0)
    for content in ("", "1\n", f"{os.getpid()}\n", "garbage", "-5"):
        path.write_text(content)
        assert nocloud.lock_holder(str(path)) == ("stopped", 0)
    assert nocloud.lock_holder(str(path / "below")) == ("stopped", 0)


def test_the_lock_tells_the_pid_whatever_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    path.write_text("4711\n")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        assert nocloud.lock_holder(str(path)) == ("running", holder.pid)
        inside = "import os, sys, nocloud; print(nocloud.lock_holder(sys.argv[1]))"
        seen = subprocess.run(
            ["unshare", "-Urp", "--fork", sys.executable, "-c", inside, str(path)],
            capture_output=True,
            text=True,
            cwd=Path(nocloud.__file__).parent,
            check=True,
        )
        assert seen.stdout == "('unknown', 0)\n"
    finally:
        holder.kill()
        holder.communicate()
    assert nocloud.lock_holder(str(path)) == ("stopped", 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_pidfile_that_may_not_be_read_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "x.pid"
    path.touch(0o000)
    assert nocloud.lock_holder(str(path)) == ("unknown", 0)


def test_a_pipe_in_the_pidfiles_place_blocks_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pid")
    assert nocloud.lock_holder(str(tmp_path / "x.pid"))[0] in ("stopped", "unknown")


# Locks and files #####################################################################################


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folders_lock_excludes_and_shares(tmp_path: Path, mode: int) -> None:
    path = str(tmp_path)
    tmp_path.chmod(mode)
    with nocloud.FolderLock(path, shared=True), nocloud.FolderLock(path, shared=True):
        with pytest.raises(nocloud.WrongState), nocloud.FolderLock(path, wait=0):
            pass
        assert nocloud.is_locked(path)
    assert not nocloud.is_locked(path)
    with nocloud.FolderLock(path):
        assert nocloud.is_locked(path)
    with pytest.raises(FileNotFoundError), nocloud.FolderLock(str(tmp_path / "nothing")):
        pass


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775])
def test_nobody_else_can_lock_a_folder(public_folder: Path, mode: int) -> None:
    """What its lock is on can't be opened by others, who could hold it for ever."""
    public_folder.chmod(mode)
    with nocloud.FolderLock(str(public_folder)):
        places = [public_folder, *public_folder.iterdir()]
        locked = [place for place in places if not takes_lock(place)]
        assert len(locked) == 1 and locked[0].stat().st_mode & 0o077 == 0
    assert nocloud.is_locked(str(public_folder)) is False and not list(public_folder.iterdir())


def takes_lock(place: Path) -> bool:
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def test_a_folder_whose_lock_can_not_be_asked_for_is_taken_for_locked(tmp_path: Path) -> None:
    """What is half-made is removed only where nobody can be at work on it."""
    folder = tmp_path / "x"
    folder.mkdir(0o755)
    (folder / ".lock").symlink_to("/dev/null")
    assert nocloud.is_locked(str(folder))
    assert not nocloud.is_locked(str(tmp_path / "nothing"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be another user")
def test_another_user_holds_up_no_command(public_folder: Path, vms: None) -> None:
    """In a tree that others may look into: not with a lock on it, nor on a template, nor on a VM."""
    with Cloud(public_folder / "home", public_folder / "vms") as blank:
        blank.base.mkdir(0o755)
        add_blank(blank)
        blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
        folders = [blank.base, blank.base / "templates/blank", *blank.base.glob("pf/**/"), *blank.base.rglob(".lock")]
        code = (
            "import fcntl, os, sys\n"
            "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
            "for place in sys.argv[1:]:\n"
            "    try:\n"
            "        fcntl.flock(os.open(place, os.O_RDONLY), fcntl.LOCK_EX)\n"
            "    except PermissionError:\n"
            "        pass\n"
            "print('held', flush=True); sys.stdin.read()\n"
        )
        argv = [sys.executable, "-c", code, *map(str, folders)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as neighbour:
            assert neighbour.stdout and neighbour.stdout.readline() == "held\n"
            try:
                done = blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web", timeout=60).ok()
                assert "waiting for another command" not in done.stderr
                blank.run("vmstop", "-d", "-g", "pf", timeout=60).quiet()
                blank.run("vmtemplate", "blank", "--delete", timeout=60).ok()
            finally:
                neighbour.communicate("", 20)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a template to others")
def test_a_template_of_somebody_else_is_cloned_without_its_lock(public_folder: Path, vms: None) -> None:
    """Nothing is written beside it; where its disk goes meanwhile, that is an error, and nothing half-made stays."""
    owner = Cloud(public_folder / "owner")
    owner.base.mkdir(0o755)
    disk = add_blank(owner)
    user = Cloud(public_folder / "user")  # none of them runs anything
    (user.base / "templates").mkdir(parents=True)
    (user.base / "templates/blank").symlink_to(disk.parent)
    programs = public_folder / "bin"
    gone = f'"$REAL" "$@" || exit; [ "$1" != create ] || mv {disk.parent} {disk.parent}.gone'
    shutil.copy(nocloud.__file__, public_folder / "nocloud.py")
    code = (
        f"import sys; sys.path.insert(0, {str(public_folder)!r}); import nocloud\n"
        "with nocloud.Cloud(nocloud.load_config()) as cloud:\n"
        "    request = nocloud.CloneRequest('', 'blank', 1, 'web', {}, prefix='web')\n"
        "    print(*nocloud.make_clones(cloud, 'pf', [request]))\n"
    )
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-IS", "-c", code]
    for path in (user.home, *user.home.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    before = sorted(disk.parent.iterdir())
    with nocloud.FolderLock(str(disk.parent)):
        done = user.execute(argv, timeout=60).ok()
    assert (done.stdout, done.stderr) == ("web00\n", "")
    assert sorted(disk.parent.iterdir()) == before
    kept = user.files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(user.env, "PATH", replace_program(programs, "qemu-img", gone))
        (programs / "qemu-img").chmod(0o755)
        disk.parent.parent.chmod(0o777)  # so that this user may move it, in its owner's place
        done = user.execute(argv, timeout=60).ok()
    assert done.stdout == f"blank: its disk has just gone: {disk}\n"
    assert user.files() == kept


def test_a_tree_is_its_owners_alone(cloud: Cloud) -> None:
    """One that is made; one that others may look into stays so."""
    cloud.env.pop("NOCLOUD_vmBaseDir")
    cloud.env["XDG_DATA_HOME"] = str(cloud.home / "share/data")
    code = "tree = nocloud.Tree(nocloud.load_config()); tree.prepare(); print(tree.base)"
    base = Path(cloud.script(code).ok().stdout.strip())
    for folder in (base, base.parent, cloud.home / "share"):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    base.chmod(0o755)
    cloud.script(code).ok()
    assert base.stat().st_mode & 0o777 == 0o755


def test_a_private_folder_makes_no_other_folder_public(tmp_path: Path) -> None:
    nocloud.make_private_folder(str(tmp_path / "a/b/c"))
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")} == {0o700}


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_lock_of_a_folder_that_was_replaced_is_no_lock(tmp_path: Path, mode: int) -> None:
    """Who waited for a folder that was removed and made again gets the new one's lock."""
    path = tmp_path / "vm"
    path.mkdir(mode)
    first = nocloud.FolderLock(str(path)).__enter__()
    waiter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import nocloud, os\nwith nocloud.FolderLock({str(path)!r}): print('new' in os.listdir({str(path)!r}))",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(nocloud.__file__).parent,
    )
    path.rename(tmp_path / "gone")
    path.mkdir(mode)
    (path / "new").touch()
    first.release()
    assert waiter.communicate(timeout=20)[0] == "True\n"


def test_files_land_whole_with_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    mask = os.umask(0o077)
    try:
        nocloud.write_file(str(path), "a\n", 0o644)
        assert path.stat().st_mode & 0o777 == 0o644
        nocloud.write_file(str(path), b"b", 0o600)
        assert path.stat().st_mode & 0o777 == 0o600 and path.read_bytes() == b"b"
    finally:
        os.umask(mask)
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError):
        nocloud.write_file(str(tmp_path / "no/file"), "x")


def test_trees_are_removed_without_following_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    doomed = tmp_path / "doomed"
    doomed.mkdir()
    (doomed / "link").symlink_to(outside)
    nocloud.remove_tree(str(doomed))
    nocloud.remove_tree(str(doomed))
    assert not doomed.exists() and (outside / "file").exists()
    doomed.symlink_to(outside)
    with pytest.raises(nocloud.Error, match="symlink"):
        nocloud.remove_tree(str(doomed))
    assert (outside / "file").exists()


def test_backing_chains_are_read_from_headers(tmp_path: Path) -> None:
    def create(*words: str) -> None:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words], cwd=tmp_path, check=True)

    (tmp_path / "sub").mkdir()
    create("a.img", "1M")
    create("-F", "qcow2", "-b", "../a.img", "sub/b.img")
    create("-F", "qcow2", "-b", "sub/b.img", "c.img")
    base = str(tmp_path)
    assert nocloud.backing_chain(f"{base}/c.img", "", lambda path: True) == [f"{base}/sub/b.img", f"{base}/a.img"]
    assert nocloud.backing_chain(f"{base}/a.img", "", lambda path: True) == []
    (tmp_path / "raw").write_bytes(b"QFI\xfb")
    assert nocloud.backing_chain(f"{base}/raw", "", lambda path: True) == []


def test_a_killed_commands_leavings_are_swept(cloud: Cloud) -> None:
    add(cloud.base, "pf/web/web00")
    for name in (".new-web01", ".del-web02"):
        (cloud.base / "pf/web" / name).mkdir()
    keep = cloud.home / "keep"
    keep.mkdir()
    (cloud.base / "pf/web/.new-link").symlink_to(keep)
    tree = tree_at(cloud.base)
    with nocloud.FolderLock(str(cloud.base / "pf/web/.new-web01")):
        nocloud.sweep(tree, "pf")
        assert (cloud.base / "pf/web/.new-web01").exists()  # its maker lives
        assert not (cloud.base / "pf/web/.del-web02").exists()
    nocloud.sweep(tree, "pf")
    assert not (cloud.base / "pf/web/.new-web01").exists()
    assert keep.is_dir() and (cloud.base / "pf/web/web00").is_dir()


# Messages ############################################################################################


def test_a_message_names_a_vm_as_shortly_as_a_command_finds_it(tree: nocloud.Tree, tmp_path: Path) -> None:
    add(tmp_path, "pf/sql/web01")
    add(tmp_path, "templates/web")
    named = {vm.full_name: str(vm) for vm in tree.vms()}
    assert named == {
        "pf/sql/db00": "pf/db00",
        "pf/sql/web01": "pf/sql/web01",
        "pf/web/web00": "pf/web00",
        "pf/web/web01": "pf/web/web01",
        "two/web/web": "two/web",
        "two/web/web00": "two/web00",
        "two/x/DB00": "two/DB00",
        "templates/debian12": "debian12",
        "templates/web": "templates/web",
    }
    for full, short in named.items():
        assert tree.need(short).full_name == full
    assert [str(vm) for vm in tree.unfinished()] == ["web02"]
    nothing = nocloud.Tree(nocloud.Config({"vmBaseDir": str(tmp_path / "nothing")}))
    assert str(nocloud.VM(nothing, "g", "t", "web00")) == "web00"


def test_an_error_carries_its_vm(tree: nocloud.Tree) -> None:
    def work(vm: nocloud.VM) -> None:
        if vm.name == "web01":
            raise nocloud.TimedOut("too slow", "wait", vm=vm)
        if vm.name == "db00":
            raise OSError(28, "No space left on device", "/x")

    errors = nocloud.in_parallel(work, list(tree.vms("pf")))
    assert [str(error) for error in errors] == ["pf/db00: /x: No space left on device", "None", "web01: too slow"]
    assert [error.text for error in errors if error] == ["/x: No space left on device", "too slow"]
    assert errors[2].vm.full_name == "pf/web/web01" and errors[2].hint == "wait"
    assert str(nocloud.Error("as it is")) == "as it is"
