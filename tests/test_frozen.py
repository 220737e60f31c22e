"""Frozen layers and clones that wake up on them, but for what a real guest does there, which test_warm.py looks at.

The guests here are blank: an empty disk, and a firmware that looks for a system. In place of the agent in the guest,
the host's side is told what it would have said.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support import ROOT, Cloud, Result, add_template, eventually
from test_layers import add_stub, chain, digest, press_key, start_stub
from test_qemu_argv import machine, qemu
from test_storms import Apart

import nocloud

VM = "pf/default/web00"
MAKE = ("instantiate", "-n", "blank", "-g", "pf", "-o", "name=web")
# What the agent says, where there is one. WAITS says nothing for longer than anybody waits.
WELL = 'nocloud.talk = lambda vm, words, seconds: "at rest" if vm.is_template else "done"'
READY = "nocloud.OwnGuest.wait = lambda guest: None\nnocloud.OwnGuest.output = lambda guest, script: ''\n"
WAITS = "import time\nnocloud.talk = lambda *words: time.sleep(600)"


@pytest.fixture
def frozen(cloud: Cloud, vms: None) -> Cloud:
    """The template `blank`, whose clones could be told who they are, frozen."""
    image = cloud.home / "blank.qcow2"
    cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"]).ok()
    add_template(cloud, image, "blank", "--mem", 32, "--cpu", 1, "--init", "systemd")
    freeze(cloud)
    return cloud


def script(before: str) -> str:
    """Python code that does what a command does, with this done before."""
    return f"{before}\nsys.exit(nocloud.main(['nocloud', *sys.argv[1:]]))"


def call(cloud: Cloud, before: str, *words: object) -> Result:
    return cloud.script(script(before), *map(str, words))


def start(cloud: Cloud, before: str, *words: str) -> subprocess.Popen[bytes]:
    """The same, and go on."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import nocloud\n{script(before)}"
    quiet = subprocess.DEVNULL
    argv = [sys.executable, "-IS", "-c", code, *words]
    return subprocess.Popen(argv, env=cloud.env, cwd=cloud.home, stdout=quiet, stderr=quiet, start_new_session=True)


def freeze(cloud: Cloud, *words: object, name: str = "blank") -> Result:
    return call(cloud, READY + WELL, "template", name, "--warm", *words).ok()


def clone(cloud: Cloud, *words: object) -> Result:
    return call(cloud, WELL, *MAKE, *words).ok()


def template_files(cloud: Cloud, name: str = "blank") -> set[str]:
    """What is in the template's folder, but for what each start leaves."""
    usual = {
        "console.log",
        "spice.sock",
        "vnc.sock",
        f"{name}.conf",
        f"{name}.log",
        f"{name}.command",
        "credentials",
        "configured",
    }
    usual |= {"ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"}
    return {path.name for path in cloud.folder(f"templates/{name}").iterdir()} - usual


def layer_files(number: int, name: str = "blank") -> set[str]:
    return {f"{name}.l{number}.img{suffix}" for suffix in ("", ".frozen", ".memory", ".state")}


COLD = {"blank_0.img"}


def present_chain(cloud: Cloud, vm: str = VM) -> list[str]:
    return chain(cloud.base / cloud.conf(vm)["vmDisk"])


# Freezing ############################################################################################


def test_what_a_freeze_leaves(frozen: Cloud) -> None:
    """Its own files, which nobody else may read; the template keeps its disk."""
    assert template_files(frozen) == COLD | layer_files(1)
    folder = frozen.folder("templates/blank")
    for name in layer_files(1):
        assert (folder / name).stat().st_mode & 0o777 == 0o600, name
    assert (folder / "blank.l1.img.memory").stat().st_size == 32 << 20
    assert os.path.basename(frozen.conf("templates/blank")["vmDisk"]) == "blank_0.img"
    assert "0 clones, warm" in frozen.run("vmtemplate", "-L").ok().stdout
    tree = frozen.run("vmtemplate", "--tree").ok().stdout
    assert "blank.l1.img.memory" in tree and "blank.l1.img.state" in tree
    assert not frozen.processes()


def test_frozen_again(frozen: Cloud) -> None:
    """What nobody stands on goes; what a clone stands on stays, without its memory, as long as the clone does."""
    freeze(frozen)
    assert template_files(frozen) == COLD | layer_files(2)
    clone(frozen)
    assert present_chain(frozen) == ["web00_0.img", "blank.l2.img", "blank_0.img"]
    memory = frozen.folder("templates/blank") / "blank.l2.img.memory"
    before = memory.stat()
    freeze(frozen)
    assert template_files(frozen) == COLD | layer_files(3) | {"blank.l2.img"}
    assert before.st_nlink == 1 and "web00 pf/default" in frozen.run("vmrunning").ok().stdout
    frozen.run("vmstop", "-d", "-g", "pf").quiet()
    assert template_files(frozen) == COLD | layer_files(3)


def test_memory_and_processors_are_the_templates_from_then_on(frozen: Cloud) -> None:
    freeze(frozen, "--mem", 40, "--cpu", 2)
    conf = frozen.conf("templates/blank")
    assert (conf["vmMem"], conf["vmCpu"]) == ("40", "2")
    assert clone(frozen).stderr == ""
    conf = frozen.conf(VM)
    assert (conf["vmMem"], conf["vmCpu"], conf["vmLayout"], conf["vmBalloon"]) == ("40", "2", "2", "no")


def test_cold(frozen: Cloud) -> None:
    """The memory goes at once, the layer when no clone stands on it; clones run on."""
    clone(frozen)
    said = frozen.run("vmtemplate", "blank", "--cold").ok().stderr
    assert re.match(r"blank: [3-6] MB are given back", said)  # as far as its BIOS had got
    assert template_files(frozen) == COLD | {"blank.l1.img"}
    assert "1 clone " in frozen.run("vmtemplate", "-L").ok().stdout
    assert "web00 pf/default running" in frozen.run("vmrunning", "-a").ok().stdout
    assert frozen.run(MAKE[0], *MAKE[1:]).ok().stderr == "", "it boots, and nothing is to be said of it"
    assert chain(frozen.base / frozen.conf("pf/default/web01")["vmDisk"]) == ["web01_0.img", "blank_0.img"]
    frozen.run("vmtemplate", "blank", "--cold").says(1, "blank: it isn't frozen", "vmtemplate blank --warm freezes it")
    frozen.run("vmstop", "-d", "-n", "web00").quiet()
    assert template_files(frozen) == COLD
    frozen.run("vmtemplate", "blank", "--warm", "--cold").fails(2, "--warm", "--cold")


def test_a_deleted_template_leaves_nothing(frozen: Cloud) -> None:
    clone(frozen)
    frozen.run("vmtemplate", "blank", "--delete").fails(1, "1 clone")
    frozen.run("vmstop", "-d", "-g", "pf").quiet()
    frozen.run("vmtemplate", "blank", "--delete").quiet()
    assert not list(frozen.base.glob("templates/*"))


def test_a_tree_that_was_moved(frozen: Cloud) -> None:
    """Clones of both kinds start there, and new ones wake up; a file of a memory that was copied isn't the same."""
    clone(frozen)
    frozen.run("vmstop", "-g", "pf", "--kill").ok()
    frozen.run("net", "--private", "down").ok()
    new = frozen.home / "moved"
    frozen.base.rename(new)
    frozen.base, frozen.env["NOCLOUD_vmBaseDir"] = new, str(new)
    frozen.start(VM).ok()
    clone(frozen)
    assert "web01 pf/default" in frozen.run("vmrunning").ok().stdout


def test_a_change_makes_what_is_frozen_stale(cloud: Cloud, vms: None) -> None:
    """It is of another disk then, which is said once: clones boot; it goes when nobody stands on it."""
    add_stub(cloud)
    conf = cloud.folder("templates/stub") / "stub.conf"
    conf.write_text(conf.read_text().replace("vmInit=none", "vmInit=systemd"))
    freeze(cloud, name="stub")
    make = ("instantiate", "-n", "stub", "-g", "pf", "-o", "name=web")
    call(cloud, WELL, *make).ok()
    assert present_chain(cloud) == ["web00_0.img", "stub.l1.img", "stub_0.img"]
    start_stub(cloud)
    press_key(cloud)
    said = "stub has changed: new clones boot, they don't wake up; vmtemplate stub --warm freezes it anew"
    assert said in cloud.run("vmtemplate", "--prune").ok().stderr
    assert cloud.run(make[0], *make[1:]).ok().stderr == ""
    assert present_chain(cloud, "pf/default/web01") == ["web01_0.img", "stub.l2.img", "stub_0.img"]
    assert "warm" not in cloud.run("vmtemplate", "-L").ok().stdout
    assert template_files(cloud, "stub") == {"stub_0.img", "stub.l1.img", "stub.l2.img"}
    cloud.run("vmstop", "-d", "-n", "web00").quiet()
    assert template_files(cloud, "stub") == {"stub_0.img", "stub.l2.img"}


def test_what_clones_stand_on_stays_in_the_hosts_memory(cloud: Cloud, vms: None) -> None:
    """By default a qemu that loads a state drops the files under its disk from there, for all; and none needs it."""
    raw, image = cloud.home / "blank.raw", cloud.home / "blank.qcow2"
    raw.write_bytes(os.urandom(32 << 20))
    cloud.execute(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image]).ok()
    add_template(cloud, image, "blank", "--mem", 32, "--cpu", 1, "--init", "systemd")
    freeze(cloud)
    base = cloud.folder("templates/blank") / "blank_0.img"
    base.read_bytes()
    subprocess.run(["sync", "-f", base], check=True)
    clone(cloud)
    shown = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output=RES", base], capture_output=True, check=True
    )
    assert int(shown.stdout) > 24 << 20
    kept = present_chain(cloud)
    cloud.run("vmsnapshot", "one", "-n", "web00").quiet()
    assert present_chain(cloud) == ["web00_0.s1.img", *kept]
    cloud.run("vmsnapshot", "--delete", "one").quiet()
    assert present_chain(cloud) == ["web00_0.s1.img", *kept[1:]]


def test_what_is_frozen_is_written_to_by_nobody(cloud: Cloud, vms: None) -> None:
    """Nor when no clone stands on the template yet: what it was frozen on is what its clones would wake up on."""
    add_stub(cloud)
    conf = cloud.folder("templates/stub") / "stub.conf"
    conf.write_text(conf.read_text().replace("vmInit=none", "vmInit=systemd"))
    freeze(cloud, name="stub")
    cloud.run("vmstop", "-d", "-g", "kept").quiet()
    before = digest(conf.parent / "stub_0.img")
    start_stub(cloud, "is frozen")
    press_key(cloud)
    assert "stub has changed: new clones boot" in cloud.run("vmtemplate", "--prune").ok().stderr
    assert digest(conf.parent / "stub_0.img") == before and "warm" not in cloud.run("vmtemplate", "-L").ok().stdout
    cloud.run("vminstantiate", "-n", "stub", "-g", "pf", "-o", "name=web").ok()
    assert present_chain(cloud) == ["web00_0.img", "stub.l2.img", "stub_0.img"]


def test_only_what_can_be_told_who_it_is(blank: Cloud) -> None:
    blank.run("vmtemplate", "blank", "--warm").says(
        2,
        "blank: its vmInit is none: only guests with systemd can be told who they are",
        "vmtemplate NAME --build SUITE makes such a template",
    )


@pytest.mark.long
def test_a_guest_without_python(tiny: Cloud) -> None:
    """Refused, in words; the template is what it was."""
    before = template_files(tiny, "tiny")
    tiny.run("vmtemplate", "tiny", "--warm").fails(1, "it has no python3, which clones that wake up need")
    assert template_files(tiny, "tiny") == before and not tiny.processes()


# Waking up ###########################################################################################


def test_a_clone_wakes_up_once(frozen: Cloud) -> None:
    """From then on it boots, from its own disk; it is the same VM, on the same devices."""
    frozen.run("vmtemplate", "-L").ok()
    assert clone(frozen).stderr == ""
    folder, conf = frozen.folder(VM), frozen.conf(VM)
    words = Path(f"/proc/{frozen.qemu(VM)}/cmdline").read_text().split("\0")
    assert "-incoming" in words and any("share=off" in word for word in words)
    by_hand = (folder / "web00.command").read_text()
    assert "incoming" not in by_hand and ".memory" not in by_hand
    assert not (folder / "frozen").exists() and (folder / "configured").exists()
    frozen.run("vmstop", "-g", "pf", "--kill").ok()
    assert frozen.start(VM).ok().stderr == ""
    words = Path(f"/proc/{frozen.qemu(VM)}/cmdline").read_text().split("\0")
    assert "-incoming" not in words and not any(".memory" in word for word in words)
    assert frozen.conf(VM) == conf
    assert present_chain(frozen) == ["web00_0.img", "blank.l1.img", "blank_0.img"]


def test_memory_is_never_written_by_a_clone(frozen: Cloud) -> None:
    memory = frozen.folder("templates/blank") / "blank.l1.img.memory"
    before = memory.read_bytes(), memory.stat().st_mtime_ns
    clone(frozen, "-C", 3)
    frozen.run("vmmanage", "-n", "web00", "system_reset").ok()
    frozen.run("vmstop", "-d", "-g", "pf").quiet()
    assert (memory.read_bytes(), memory.stat().st_mtime_ns) == before


def boots(done: Result, *words: str) -> None:
    """It runs, and one line says why it had to boot."""
    (line,) = done.ok().stderr.splitlines()
    assert line.startswith("nocloud instantiate: web00 boots: "), repr(done)
    for word in words:
        assert word in line, repr(done)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("mem=48", ("another machine", "48M")),
        ("cpu=2", ("another machine", "2,sockets=1,cores=2")),
        ("disk=1", ("a disk is grown at boot only",)),
        ("share=.:/srv", ("folders are shared at boot only",)),
        ("dsk=1,1,1,1,1", ("5 disks besides, and not at most 4",)),
    ],
)
def test_why_a_clone_boots(frozen: Cloud, option: str, words: tuple[str, ...]) -> None:
    site = frozen.home / "site"
    site.mkdir()
    done = frozen.run(*MAKE[:-1], f"name=web;{option.replace('=.', f'={site}')}")
    boots(done, *words)
    assert present_chain(frozen) == ["web00_0.img", "blank_0.img"]
    assert not (frozen.folder(VM) / "frozen").exists()


@pytest.mark.parametrize("how", ["cold", "--cold"])
def test_one_that_is_to_boot(frozen: Cloud, how: str) -> None:
    words = [*MAKE[:-1], "name=web;disk=1", how] if how[0] == "-" else [*MAKE[:-1], "name=web;cold"]
    assert frozen.run(*words).ok().stderr == ""
    assert present_chain(frozen) == ["web00_0.img", "blank_0.img"] and frozen.conf(VM)["vmCold"] == "yes"


def touch(path: Path) -> None:
    os.utime(path)


def shorten(path: Path) -> None:
    os.truncate(path, 1 << 20)


def garbage(path: Path) -> None:
    path.with_suffix(".state").write_bytes(b"\xff" * 1000)


def no_manifest(path: Path) -> None:
    path.with_suffix(".frozen").write_text('{"machine": 7')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (touch, "blank.l1.img.memory isn't as it was left"),
        (shorten, "blank.l1.img.memory isn't as it was left"),
        (Path.unlink, "blank.l1.img.memory"),
        (garbage, ""),
        (no_manifest, "blank.l1.img.frozen can't be read"),
    ],
)
def test_what_is_frozen_was_spoilt(frozen: Cloud, spoil: Any, words: str) -> None:
    """Warm is never worse than cold."""
    spoil(frozen.folder("templates/blank") / "blank.l1.img.memory")
    boots(frozen.run(*MAKE), words)
    assert present_chain(frozen) == ["web00_0.img", "blank_0.img"]
    assert "web00 pf/default running" in frozen.run("vmrunning", "-a").ok().stdout


def test_the_doctor_reads_what_is_frozen(frozen: Cloud) -> None:
    folder = frozen.folder("templates/blank")
    assert re.search(
        r"blank\.l1\.img  .* MB  new clones wake up on this", frozen.run("vmtemplate", "--tree").ok().stdout
    )
    assert frozen.run("doctor", "frozen").ok().stdout == "ok       frozen: 1 template frozen\n"
    assert "all memory read" in frozen.run("doctor", "frozen", "--deep").ok().stdout
    manifest = folder / "blank.l1.img.frozen"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "sha256": facts["sha256"].swapcase()[::-1]}))
    frozen.run("doctor", "frozen").ok()
    told = frozen.run("doctor", "frozen", "--deep").stdout
    assert "blank.l1.img.memory isn't as it was left" in told and told.endswith("  vmtemplate blank --warm\n")
    (folder / "blank.l1.img.memory").unlink()
    assert frozen.run("doctor", "frozen").stdout.startswith("warning  frozen: ")


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        ("nocloud.WAKE_SECONDS = 1", "the agent in it said: nothing"),
        ('nocloud.talk = lambda *words: "OSError(28, \\x1b[31m)"', "the agent in it said: OSError(28"),
    ],
)
def test_an_agent_that_does_not_do_it(frozen: Cloud, agent: str, words: str) -> None:
    done = call(frozen, agent, *MAKE)
    boots(done, words)
    assert "\x1b" not in done.stderr
    assert present_chain(frozen) == ["web00_0.img", "blank_0.img"]


def test_one_whose_waking_was_killed(frozen: Cloud) -> None:
    """Its guest takes itself for the template's. That is said, a stop switches it off, the next start begins anew."""
    process = start(frozen, WAITS, *MAKE)
    shown = ("vmmanage", "-n", "web00", "info status")
    try:
        eventually(lambda: "VM status: running" in frozen.run(*shown).stdout, "its guest goes on")
        assert frozen.run("vmrunning").ok().stdout.split()[:2] == ["web00", "pf/default"]
        assert "waking" not in frozen.run("vmrunning", "-a").ok().stdout, "somebody is at it"
    finally:
        process.kill()
        process.wait()
    assert frozen.run("vmrunning").ok().stdout.split()[:3] == ["web00", "pf/default", "waking"]
    frozen.ssh("web00", "true").says(1, "web00: it is waking", "vmstop --kill -n web00")
    assert "warning  vms: pf/default/web00 is waking" in frozen.run("doctor", "vms").stdout
    frozen.run("vmstop", "--save", "-n", "web00").fails(1, "it is waking")
    assert frozen.run("vmstop", "-g", "pf", "--timeout", 60).ok().seconds < 30
    assert (frozen.folder(VM) / "frozen").exists()
    done = wake(frozen, "web00").ok()
    assert done.stdout + done.stderr == "" and not (frozen.folder(VM) / "frozen").exists()
    assert frozen.run("vmrunning", "-a").ok().stdout.split()[:3] == ["web00", "pf/default", "running"]


@pytest.mark.parametrize("count", [1, 3])
def test_interrupted_while_they_wake_up(frozen: Cloud, count: int) -> None:
    """Switched off at once, as they were; they can still wake up."""
    process = frozen.spawn(*MAKE, "-C", count)
    names = [f"web{number:02}" for number in range(count)]
    shown = ("vmmanage", "-n", names[-1], "info status")
    eventually(lambda: "VM status: running" in frozen.run(*shown).stdout, "its guest goes on, and nobody answers")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "boots" not in said and "Traceback" not in said, said
    assert not frozen.run("vmrunning").ok().stdout
    for name in names:
        assert (frozen.folder(f"pf/default/{name}") / "frozen").exists()
    assert wake(frozen, *names).ok().stdout == ""
    assert len(frozen.run("vmrunning").ok().lines) == count


def wake(cloud: Cloud, *names: str) -> Result:
    """Start VMs whose agent does what it is told."""
    return cloud.script(
        f"{WELL}\nwith nocloud.Cloud(nocloud.load_config()) as cloud:\n"
        "    results = nocloud.start_all(cloud, [cloud.tree.need(name) for name in sys.argv[1:]])\n"
        "    [print(error) for error in results if error]",
        *names,
    )


@pytest.mark.long
def test_killed_at_any_instant(frozen: Cloud, survived: Callable[[str, int], None]) -> None:
    """Thirty times SIGKILL hits who freezes, or who wakes up: the template is what it was, clones are whole or gone."""
    seed, rounds, longest = int(os.environ.get("SEED") or time.time_ns() % 10**9), 30, {True: 0.0, False: 0.0}
    print(f"SEED={seed}")
    random = Random(seed)
    for number in range(rounds):
        freezes = bool(number % 2)
        before = template_files(frozen)
        words, began = ["template", "blank", "--warm"] if freezes else [*MAKE, "-C", "2"], time.monotonic()
        process = start(frozen, READY + WELL, *words)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the first round of each tells how long it takes
            process.wait(random.uniform(0.05, longest[freezes]) if longest[freezes] else 10)
        longest[freezes] = longest[freezes] or time.monotonic() - began
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        rows = [line.split() for line in frozen.run("vmrunning", "-a").ok().lines]
        if freezes:
            eventually(lambda: frozen.run("vmrunning").ok().stdout == "", "its qemu has ended with it")
            frozen.run("vmstop", "-g", "templates").ok()
            assert os.path.basename(frozen.conf("templates/blank")["vmDisk"]) == "blank_0.img"
        names = [row[0] for row in rows if row[1] == "pf/default"]
        assert {row[2] for row in rows if row[1] == "pf/default"} <= {"running", "waking", "stopped"}, rows
        if names:
            frozen.run("vmstop", "-g", "pf", "--kill").ok()
            done = wake(frozen, *names).ok()
            assert done.stdout == "" and "Traceback" not in done.stderr, repr(done)
            assert len(frozen.run("vmrunning").ok().lines) == len(names)
            for name in names:
                assert present_chain(frozen, f"pf/default/{name}")[-1] == "blank_0.img"
            frozen.run("vmstop", "-d", "-g", "pf").ok()
        done = clone(frozen)
        assert done.stderr == "" and len(present_chain(frozen)) == 3, "what is frozen is whole"
        frozen.run("vmstop", "-d", "-g", "pf").ok()
        left = template_files(frozen)
        assert freezes or left == before
        assert len(left) == 5 and left > COLD, left
    survived("SIGKILL of a freeze, or of clones that wake up", rounds)


# What is compared ####################################################################################


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[nocloud.Layer]:
    """A layer that was frozen as machine() is, by a qemu that is a file here."""
    binary = tmp_path / "qemu"
    binary.write_text("7.2")
    template = nocloud.VM(nocloud.Tree(nocloud.Config({"vmBaseDir": str(tmp_path)})), "templates", "", "t")
    os.makedirs(template.folder)
    layer = nocloud.Layer(template, "t.l1.img")
    Path(layer.memory).write_bytes(bytes(4096))
    was = nocloud.frozen_facts(this(tmp_path, name="t", memory="t.l1.img.memory", record="t.l1.img.record"))
    facts = {"machine": was, "memory": nocloud.memory_facts(layer), "token": "abc"}
    Path(layer.manifest).write_text(json.dumps(facts))
    yield layer


def this(folder: Path, **changes: Any) -> nocloud.Machine:
    binary = nocloud.Qemu(str(folder / "qemu"), changes.pop("version", "7.2.0"), "pc-q35-7.2", qemu().options)
    return machine(**{"qemu": binary, "vmLayout": "2", "vmBalloon": "no", **changes})


def test_what_may_differ(tmp_path: Path, layer: nocloud.Layer) -> None:
    """Whose it is."""
    own = {"vmUuid": "1" * 8, "vmMac": "00:50:56:00:00:01", "credentials": "credentials", "pid_file": "x.pid"}
    changes = {"name": "other", "disks": [("x.img", "qcow2", "x_0")], "memory": "../m", "wakes": True, **own}
    assert nocloud.check_frozen(layer, this(tmp_path, **changes)) == "abc"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vmMem": "640"}, "640M"),
        ({"vmCpu": "3"}, "3,sockets=1"),
        ({"vmMachine": "pc-q35-8.0"}, "pc-q35-8.0"),
        ({"screen": "vnc"}, "-vnc"),
        ({"accel": "kvm"}, "another kernel of this host"),
        ({"version": "8.0.0"}, "another qemu"),
        ({"extra": ["-s"]}, "another machine, not with -s"),
        ({"seed": "seed"}, "label=CIDATA"),
        ({"vmBalloon": "yes"}, "virtio-balloon"),
        ({"vmLayout": "1"}, "fewer devices"),
        ({"disks": [("x.img", "raw", "x_0")]}, "driver=raw"),
        ({"iso": "/x.iso"}, "x.iso"),
        ({"vmKernel": "vmlinuz"}, "vmlinuz"),
    ],
)
def test_another_machine(tmp_path: Path, layer: nocloud.Layer, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(nocloud.Error) as raised:
        nocloud.check_frozen(layer, this(tmp_path, **changes))
    assert words in raised.value.text and "\n" not in raised.value.text


def test_another_kernel_counts_with_kvm_only(
    tmp_path: Path, layer: nocloud.Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.uname()
    other = os.uname_result((*real[:2], "9.9", *real[3:]))
    kvm = nocloud.frozen_facts(this(tmp_path, accel="kvm"))
    monkeypatch.setattr(os, "uname", lambda: other)
    assert nocloud.check_frozen(layer, this(tmp_path)) == "abc"
    assert (kvm["kernel"], nocloud.frozen_facts(this(tmp_path, accel="kvm"))["kernel"]) == (real.release, "9.9")


def test_another_binary_of_the_same_version(tmp_path: Path, layer: nocloud.Layer) -> None:
    os.utime(tmp_path / "qemu", (1, 1))
    with pytest.raises(nocloud.Error, match="another qemu"):
        nocloud.check_frozen(layer, this(tmp_path))


def size(path: Path) -> None:
    path.write_bytes(bytes(8192))


def inode(path: Path) -> None:
    info = path.stat()
    path.with_suffix(".new").write_bytes(path.read_bytes())
    os.utime(path.with_suffix(".new"), ns=(info.st_atime_ns, info.st_mtime_ns))
    path.with_suffix(".new").rename(path)


def contents(path: Path) -> None:
    """Written to, and the time set back."""
    info = path.stat()
    path.write_bytes(b"x" * 4096)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize("change", [size, inode, contents, touch])
def test_another_memory(tmp_path: Path, layer: nocloud.Layer, change: Any) -> None:
    change(Path(layer.memory))
    with pytest.raises(nocloud.Error, match=r"isn't as it was left; vmtemplate t --warm makes it anew"):
        nocloud.check_frozen(layer, this(tmp_path))


MANIFESTS = [b"", b"{}", b"[]", b"null", b'{"machine": 1, "token": 2, "memory": 3}', b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_manifest_that_is_garbage(tmp_path: Path, layer: nocloud.Layer, text: bytes) -> None:
    Path(layer.manifest).write_bytes(text)
    with pytest.raises(nocloud.Error, match=r"t\.l1\.img\.(frozen can't be read|memory isn't as)"):
        nocloud.check_frozen(layer, this(tmp_path))


@pytest.mark.long
def test_a_disk_that_fills_up_while_it_freezes(tmp_path: Path, vms: None, survived: Callable[[str, int], None]) -> None:
    """From no room on, a little more each time, never asked for before: frozen, or what it was, and a word."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a disk of its own that its namespaces of users can use")
    unasked = "nocloud.check_room = lambda *rest, **named: None"
    tried, done = 0, False
    with Apart(tmp_path / "home") as cloud:
        image = cloud.home / "blank.qcow2"
        cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"]).ok()
        add_template(cloud, image, "blank", "--mem", 32, "--cpu", 1, "--init", "systemd")
        while not done:
            assert tried < 200, "it never had room enough"
            cloud.resize(max(cloud.used() + (tried << 16), 4096))
            ended = call(cloud, f"{READY}{WELL}\n{unasked}", "template", "blank", "--warm")
            cloud.resize(64 << 20)
            tried, done = tried + 1, ended.status == 0
            told = f"{tried}: {ended!r}"
            assert "Traceback" not in ended.stderr and (done or ended.stderr), told
            assert template_files(cloud) == COLD | (layer_files(1) if done else set()) and not cloud.processes(), told
            cloud.run("vmtemplate", "-L").ok()
        cloud.run("net", "--private", "down").ok()
    survived("a disk that fills up while a template is frozen", tried)


# The agent ###########################################################################################


def agent(**names: Any) -> dict[str, Any]:
    """The agent's functions, with these of its names replaced; main() isn't called."""
    tree = ast.parse((ROOT / "etc/guest/agent.py").read_text())
    assert ast.unparse(tree.body.pop()) == "main()"
    space: dict[str, Any] = {"__name__": "agent", "__file__": "agent"}
    argv, sys.argv = sys.argv, ["agent", "lo", "token", "1"]
    try:
        exec(compile(tree, "agent.py", "exec"), space)
    finally:
        sys.argv = argv
    space["CHANNEL"].close()
    return {**space, **names}


@contextlib.contextmanager
def line() -> Iterator[tuple[int, int]]:
    """A serial line: the host's end, the guest's."""
    host, guest = pty.openpty()
    space = agent()
    space["tty"].setraw(guest)
    try:
        yield host, guest
    finally:
        os.close(host)
        os.close(guest)


def test_the_agent_hears_only_who_has_its_token() -> None:
    """Whatever comes before; a line may come in pieces."""
    said = [
        b"\n",
        b"garbage\n",
        b"7\n",
        b"[]\n",
        b'{"token": "other"}\n',
        b'{"x": 1}\n',
        b"\xff\xfe\n",
        b'{"token": "tok',
    ]
    with line() as (host, guest):
        heard: list[Any] = []
        space = agent()
        thread = threading.Thread(target=lambda: heard.append(space["hear"](guest)))
        thread.start()
        for piece in [*said, b'en", "x": 2}\n']:
            os.write(host, piece)
            if piece != said[-1]:
                eventually(lambda: os.isatty(guest) and not pending(guest), "it was read")
        thread.join(10)
    assert heard == [{"token": "token", "x": 2}]


def pending(fd: int) -> bool:
    import select

    return bool(select.select([fd], [], [], 0)[0])


def test_what_the_agent_writes(tmp_path: Path) -> None:
    """With its mode from the first moment on, over what is there."""
    import pwd

    me = pwd.getpwuid(os.geteuid()).pw_name
    space, file = agent(), tmp_path / "key"
    file.write_text("something longer that was there before")
    file.chmod(0o644)
    space["write"](str(file), "secret\n", 0o600, me)
    assert file.read_text() == "secret\n" and file.stat().st_mode & 0o777 == 0o600
    assert space["read"](str(file)) == "secret\n" and space["read"](str(tmp_path / "none")) == ""


def test_the_agent_starts_no_process_and_imports_nothing_later() -> None:
    """In a guest that wakes up everything takes its time."""
    tree = ast.parse((ROOT / "etc/guest/agent.py").read_text())
    for each in ast.walk(tree):
        if isinstance(each, (ast.Import, ast.ImportFrom)):
            assert each in tree.body
            assert "subprocess" not in [name.name for name in each.names]
        if isinstance(each, ast.Attribute):
            assert each.attr not in ("system", "popen", "fork", "execv", "posix_spawn", "spawnv")


def test_the_words_that_it_is_told_are_one_line(tmp_path: Path) -> None:
    template = nocloud.VM(nocloud.Tree(nocloud.Config({"vmBaseDir": str(tmp_path)})), "pf", "web", "web00")
    os.makedirs(template.folder)
    template.write_conf(
        {"vmInit": "systemd", "vmUuid": "6ba7b810-9dad-41d1-80b4-00c04fd430c8", "vmMac": "00:50:56:6b:a7:b8"}
    )
    for suffix in ("", ".pub"):
        Path(template.host_key + suffix).write_text("ssh-ed25519 AAAA x\n")
    words = [nocloud.waking_words(template, ["ssh-ed25519 BBBB y\n"], "tok") for _ in range(2)]
    told = [json.loads(each) for each in words]
    assert all(each.endswith(b"}\n") and each.count(b"\n") == 1 for each in words)
    assert told[0]["random"] != told[1]["random"] and told[0]["id"] == "6ba7b8109dad41d180b400c04fd430c8"
    assert {"/etc/ssh/ssh_host_ed25519_key", "/etc/hostname"} <= {each[1] for each in told[0]["files"]}
