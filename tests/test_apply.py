"""A group becomes what its description says: plans, by tables, and what they do to VMs."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import READY, Cloud, Terminal, add_blank, eventually, tree_at
from test_bash_trees import free_port
from test_ports import listening
from test_supervisor import Run

import nocloud

GIB = nocloud.GIB
PLAIN = {"vmMem": "512", "vmCpu": "1", "vmPorts": "", "vmShares": "", "vmGui": "no", "vmCold": "no", "vmCpuCap": ""}


def there(
    name: str,
    type: str = "web",
    *,
    run: bool = True,
    template: str = "deb",
    disks: tuple[float, ...] = (10,),
    user_data: bytes = b"",
    **own: str,
) -> nocloud.Present:
    """A VM; `own`: its settings by the names that a description has for them."""
    settings = {**PLAIN, **{nocloud.CLONE_OPTION[key].sets: value for key, value in own.items()}}
    sizes = [int(each * GIB) for each in disks]
    return nocloud.Present(name, type, template, settings, sizes, name.count("-") == 4, run, user_data=user_data)


TEMPLATES = {name: there(name, "", template="") for name in ("deb", "new")}
U1, U2, U3 = (f"{number}0000000-0000-4000-8000-000000000000" for number in (1, 2, 3))


def lines(text: str, *vms: nocloud.Present) -> list[str]:
    requests = nocloud.parse_description(text, "FILE", "default")
    return [step.line for step in nocloud.plan(requests, vms, TEMPLATES)]


TABLE: Mapping[str, tuple[str, list[nocloud.Present], list[str]]] = {
    "nothing there": ("deb:2:web:name=web", [], ["create web00", "create web01"]),
    "as it is": ("deb:2:web:name=web", [there("web00"), there("web01")], ["keep web00", "keep web01"]),
    "up": ("deb:3:web:name=web", [there("web00")], ["keep web00", "create web01", "create web02"]),
    "down": (
        "deb:1:web:name=web",
        [there("web00"), there("web01"), there("web100")],
        ["destroy web01", "destroy web100", "keep web00"],
    ),
    "a gap": ("deb:3:web:name=web", [there("web00"), there("web02")], ["keep web00", "create web01", "keep web02"]),
    "another type": ("deb:1:web:name=web", [there("web00", "sql")], ["destroy web00", "create web01"]),
    "case": ("deb:1:web:name=WEB", [there("Web00")], ["keep Web00"]),
    "full names": (
        "deb:3:web:name=web00,web03,front",
        [there("web00"), there("web01")],
        ["destroy web01", "keep web00", "create web03", "create front"],
    ),
    "a full name": ("deb:1:web:name=front,", [there("front00")], ["destroy front00", "create front"]),
    "a full name and its prefix": (
        "deb:1:web:name=web01,\ndeb:1:web:name=web",
        [there("web00"), there("web01")],
        ["keep web01", "keep web00"],
    ),
    "two lines of a prefix": (
        "deb:1:web:name=web\ndeb:1:web:name=web;mem=1024",
        [there("web00"), there("web01", mem="1024")],
        ["keep web00", "keep web01"],
    ),
    "uuids": (
        "deb:2:web\ndeb:1:web:mem=1024",
        [there(U1, mem="1024"), there(U2), there(U3)],
        [f"keep {U2}", f"keep {U3}", f"keep {U1}"],
    ),
    "fewer uuids": ("deb:1:web", [there(U1), there(U2)], [f"destroy {U2}", f"keep {U1}"]),
    "more uuids": ("deb:2:web", [there(U1)], [f"keep {U1}", "create a VM of type web"]),
    "uuids of another template": ("new:1:web", [there(U1)], [f"destroy {U1}", "create a VM of type web"]),
    "memory": (
        "deb:2:web:name=web;mem=1024",
        [there("web00"), there("web01", run=False)],
        ["change web00: mem 512 → 1024 (restart)", "change web01: mem 512 → 1024"],
    ),
    "the template's again": (
        "deb:1:web:name=web",
        [there("web00", mem="1024", cpu="4", cap="20", gui="yes")],
        ["change web00: mem 1024 → 512, cpu 4 → 1, gui yes → no, cap 20 → none (restart)"],
    ),
    "ports": (
        "deb:2:web:name=web;port=8080:80",
        [there("web00", port="127.0.0.1:8080:80"), there("web01")],
        ["keep web00", "change web01: port none → 127.0.0.1:8081:80"],
    ),
    "a port that was chosen": (
        "deb:1:web:name=web;port=0:80,8443:443",
        [there("web00", port="127.0.0.1:8443:443,127.0.0.1:20000:80")],
        ["keep web00"],
    ),
    "ports and memory": (
        "deb:1:web:name=web;port=8080:80;mem=1024",
        [there("web00")],
        ["change web00: port none → 127.0.0.1:8080:80", "change web00: mem 512 → 1024 (restart)"],
    ),
    "disks": (
        "deb:1:db:name=db;disk=20;dsk=5,5",
        [there("db00", "db", disks=(10, 5))],
        ["grow db00: disk 10 → 20 GB", "add db00: disk of 5 GB"],
    ),
    "a data disk": ("deb:1:db:name=db;dsk=10", [there("db00", "db", disks=(10, 5))], ["grow db00: vdb 5 → 10 GB"]),
    "a disk that isn't whole": ("deb:1:db:name=db;dsk=1", [there("db00", "db", disks=(2.2, 0.5))], ["keep db00"]),
    "a data disk less": (
        "deb:1:db:name=db;dsk=5",
        [there("db00", "db", disks=(10, 5, 7))],
        ["remove db00: vdc of 7 GB (restart)"],
    ),
    "another template": (
        "new:1:web:name=web;mem=1024",
        [there("web00")],
        ["replace web00: template deb → new"],
    ),
    "another user-data": (
        "deb:1:web:name=web;user-data=FILE;mem=1024",
        [there("web00", user_data=b"#cloud-config")],
        ["replace web00: another user-data", "change web00: mem 512 → 1024 (restart)"],
    ),
    "user-data no more": (
        "deb:1:web:name=web",
        [there("web00", user_data=b"#cloud-config")],
        ["replace web00: another user-data"],
    ),
    "the same user-data": (
        "deb:2:web:name=web;user-data=FILE",
        [there("web00", user_data=b"#cloud-config\npackages: [git]\n")],
        ["keep web00", "create web01"],
    ),
    "nothing is left": (
        "deb:1:web:name=web",
        [there("x", "a"), there("y", "b")],
        ["destroy x", "destroy y", "create web00"],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_plans(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("FILE").write_text("#cloud-config\npackages: [git]\n")
    text, vms, expected = TABLE[name]
    assert lines(text, *vms) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("deb:1:db:name=db;disk=5", "FILE:1: db00: disk 10 → 5 GB, and a disk never shrinks"),
        ("deb:1:db:name=db;dsk=4", "FILE:1: db00: vdb 5 → 4 GB, and a disk never shrinks"),
        ("deb:1:db:name=db,\ndeb:1:sql:name=DB,", "FILE: name=db: it is in two lines"),
        ("deb:2:db:name=db,", "FILE:1: name=db,: 1 name for a COUNT of 2"),
        ("deb:2:db:name=db,DB", "FILE:1: name=db,DB: 2 names for a COUNT of 2"),
        ("deb:2:db:name=a,,b", "FILE:1: name=a,,b: the VM name is empty"),
        ("deb:1:db:name=a/b,", "FILE:1: name=a/b,: 'a/b': '/' is not allowed in a VM name"),
    ],
)
def test_plans_that_can_not_be(text: str, said: str) -> None:
    with pytest.raises(nocloud.UsageError) as raised:
        lines(text, there("db00", "db", disks=(10, 5)))
    assert str(raised.value) == said


# What is done ########################################################################################


def described(cloud: Cloud, text: str, name: str = "pf") -> Path:
    path = cloud.home / name
    path.write_text(text)
    return path


def facts(cloud: Cloud) -> dict[str, dict[str, object]]:
    """What vmrunning -a --json says of the group's VMs, by name."""
    return {each["name"]: each for each in json.loads(cloud.run("vmrunning", "-a", "--json", "-g", "pf").ok().stdout)}


def states(cloud: Cloud) -> dict[str, object]:
    return {name: each["state"] for name, each in facts(cloud).items()}


def uuids(cloud: Cloud) -> dict[str, object]:
    return {name: each["uuid"] for name, each in facts(cloud).items()}


def contents(cloud: Cloud) -> dict[str, bytes]:
    """The tree, byte for byte, but for what its running qemus write."""
    return {
        name: (cloud.base / name).read_bytes()
        for name in sorted(cloud.files())
        if (cloud.base / name).is_file() and not name.endswith((".log", ".img"))
    }


@pytest.fixture
def group(blank: Cloud) -> Cloud:
    """A cloud whose guests, which no power button ends, are switched off soon."""
    blank.env["NOCLOUD_vmStopTimeout"] = "1"
    return blank


def nothing_to_do(cloud: Cloud, file: Path) -> None:
    before = contents(cloud)
    for words in ((), ("--dry-run",)):
        done = cloud.run("vmapply", "-f", file, *words)
        assert (done.status, done.lines[-1:]) == (0, ["nothing to do"]), repr(done)
    assert contents(cloud) == before


def test_up_and_down(group: Cloud) -> None:
    file = described(group, "blank:2:web:name=web\n")
    shown = group.run("vmapply", "-f", file, "--dry-run")
    assert (shown.status, shown.lines) == (3, ["create web00", "create web01"])
    assert not group.groups()
    assert group.run("vmapply", "-f", file).ok().lines == ["create web00", "create web01"]
    nothing_to_do(group, file)
    first = uuids(group)
    described(group, "\ufeffblank:4:web:\tname=web\r\n")
    assert group.run("vmapply", "-f", file).ok().lines == ["keep web00", "keep web01", "create web02", "create web03"]
    described(group, "blank:2:web:name=web\n")
    refused = group.run("vmapply", "-f", file)
    assert refused.lines == ["destroy web02", "destroy web03", "keep web00", "keep web01"]
    question = "destroy web02; destroy web03: what is on these disks will be gone."
    assert f"vmapply: {question} Nothing has been done\n(hint: -y says that it is meant)\n" in refused.stderr.replace(
        "nocloud apply", "vmapply"
    )
    assert refused.status == 1 and len(states(group)) == 4
    group.run("vmapply", "-f", file, "-y").ok()
    assert states(group) == {"web00": "running", "web01": "running"}
    assert uuids(group) == {name: first[name] for name in ("web00", "web01")}
    nothing_to_do(group, file)


def test_memory_and_disks_and_ports(group: Cloud) -> None:
    file = described(group, "blank:2:web:name=web\n")
    group.run("vmapply", "-f", file).ok()
    pids = {name: group.qemu(f"pf/web/{name}") for name in ("web00", "web01")}
    described(group, "blank:2:web:name=web;mem=48;disk=1;dsk=1;port=0:80\n")
    done = group.run("vmapply", "-f", file).ok()
    assert "web01 needs a restart for that: --restart" in done.stderr
    now = {name: group.conf(f"pf/web/{name}") for name in pids}
    assert [each["vmMem"] for each in now.values()] == ["32", "32"]
    assert all(each["vmPorts"] and each["vmPlugged"] == "1" for each in now.values())
    for name, pid in pids.items():
        assert group.qemu(f"pf/web/{name}") == pid
        shown = group.run("vmmanage", "-n", name, "info", "block").ok().stdout
        assert f"{name}_1.img" in shown
        size = json.loads(
            group.execute(
                ["qemu-img", "info", "-U", "--output=json", group.base / now[name]["vmDisk"]]
            ).ok().stdout
        )  # fmt: skip
        assert size["virtual-size"] == nocloud.GIB
    assert group.run("vmapply", "-f", file).ok().lines == [
        "change web00: mem 32 → 48 (restart)",
        "change web01: mem 32 → 48 (restart)",
    ]
    group.run("vmapply", "-f", file, "--restart").ok()
    assert all(group.qemu(f"pf/web/{name}") != pid for name, pid in pids.items())
    assert [group.conf(f"pf/web/{name}")["vmMem"] for name in pids] == ["48", "48"]
    nothing_to_do(group, file)
    described(group, "blank:2:web:name=web;mem=48\n")
    refused = group.run("vmapply", "-f", file, "--restart")
    assert "remove web00: vdb of 1 GB (restart)" in refused.lines and refused.status == 1
    group.run("vmapply", "-f", file, "--restart", "-y").ok()
    assert [path.name for path in group.folder("pf/web/web00").glob("*.img")] == ["web00_0.img"]
    assert not group.conf("pf/web/web00")["vmPorts"]
    nothing_to_do(group, file)


def test_what_is_off_stays_off(group: Cloud) -> None:
    file = described(group, "blank:1:web:name=web\n")
    group.run("vmapply", "-f", file).ok()
    group.run("vmstop", "-g", "pf", "--kill").ok()
    nothing_to_do(group, file)
    described(group, "blank:1:web:name=web;mem=48;dsk=2\n")
    assert group.run("vmapply", "-f", file).ok().lines == ["change web00: mem 32 → 48", "add web00: disk of 2 GB"]
    assert states(group) == {"web00": "stopped"}
    nothing_to_do(group, file)


def test_what_a_killed_command_made_is_known(cloud: Cloud, vms: None) -> None:
    """It was killed before the host keys that it planted were published: who starts those VMs does that."""
    add_blank(cloud, "blank")
    conf = cloud.folder("templates/blank") / "blank.conf"
    conf.write_text(conf.read_text().replace("vmInit=none", "vmInit=systemd"))
    file = described(cloud, "blank:1:web:name=web\n")
    die = "import os\nnocloud.publish_keys = lambda *words: os._exit(137)\n"
    main = "sys.exit(nocloud.main(sys.argv[1:]))"

    def is_known(uuid: str) -> bool:
        return uuid in nocloud.read_existing(str(cloud.base / ".known_hosts"))

    for words in (("vmapply", "-f", file), ("vmrun", "-r", "pf")):
        assert cloud.script(die + main, "vminstantiate", "-f", file).status == 137
        uuid = cloud.conf("pf/web/web00")["vmUuid"]
        assert not is_known(uuid)
        child = cloud.spawn(*words)
        eventually(functools.partial(is_known, uuid), "its key is known")
        eventually(lambda: states(cloud) == {"web00": "running"}, "it runs")
        cloud.run("vmstop", "-d", "-g", "pf").ok()
        child.communicate(timeout=30)


@pytest.mark.long
def test_another_template(group: Cloud) -> None:
    add_blank(group, "other")
    file = described(group, "blank:2:web:name=web;port=0:80\n")
    group.run("vmapply", "-f", file).ok()
    old = uuids(group)
    described(group, "other:2:web:name=web;port=0:80\n")
    kept = group.run("vmapply", "-f", file).ok()
    assert kept.lines == [
        "keep web00: template blank → other (--replace)",
        "keep web01: template blank → other (--replace)",
        "nothing to do",
    ]
    assert "-y says that it is meant" in group.run("vmapply", "-f", file, "--replace").stderr
    assert uuids(group) == old
    group.run("vmapply", "-f", file, "--replace", "-y").ok()
    assert states(group) == {"web00": "running", "web01": "running"}
    assert {str(each["template"]) for each in facts(group).values()} == {"other"}
    nothing_to_do(group, file)


def test_who_is_asked(group: Cloud) -> None:
    file = described(group, "blank:1:web:name=web\n")
    group.run("vmapply", "-f", file).ok()
    described(group, "blank:1:web:name=other,\n")
    question = "destroy web00: what is on these disks will be gone. Go on? [y/N]"
    for answer, status in (("n\n", 1), ("y\n", 0)):
        with Terminal(group, "vmapply", "-f", file) as terminal:
            terminal.see(question)
            terminal.type(answer)
            terminal.ends(status)
    assert states(group) == {"other": "running"}


def test_two_at_once(group: Cloud) -> None:
    """The second one waits, and finds nothing to do."""
    file = described(group, "blank:3:web:name=web\n")
    both = [group.spawn("vmapply", "-f", file) for _ in range(2)]
    told = [each.communicate(timeout=120) for each in both]
    assert [each.returncode for each in both] == [0, 0], told
    created = [f"create web0{number}" for number in range(3)]
    assert sorted(out.splitlines()[0] for out, _ in told) == [created[0], "nothing to do"]
    assert list(states(group).values()) == ["running"] * 3


@pytest.mark.long
def test_beside_a_vmstop(group: Cloud) -> None:
    """Whichever is first, no half of a VM is left, and called again it does the rest."""
    file = described(group, "blank:3:web:name=web\n")
    applying = group.spawn("vmapply", "-f", file)
    while applying.poll() is None:
        group.run("vmstop", "-d", "-g", "pf").ok()
    _, err = applying.communicate()
    assert "a defect" not in err and "Traceback" not in err, err
    group.run("vmapply", "-f", file).ok()
    assert list(states(group).values()) == ["running"] * 3
    nothing_to_do(group, file)


def test_what_was_interrupted_is_finished(group: Cloud) -> None:
    """VMs that were made, or switched off for a change, and not started."""
    file = described(group, "blank:2:web:name=web\n")
    group.run("vmapply", "-f", file).ok()
    group.run("vmstop", "-g", "pf", "--kill").ok()
    (group.folder("pf/web/web01") / "web01.command").unlink()
    assert group.run("vmapply", "-f", file).ok().lines == ["keep web00", "start web01"]
    assert states(group) == {"web00": "stopped", "web01": "running"}


def test_beside_a_vmrun(group: Cloud) -> None:
    file = described(group, "blank:2:web:name=web\n")
    run = Run(group, "-f", file, "--apply", env={})
    try:
        eventually(lambda: group.groups() and list(states(group).values()) == ["running"] * 2, "both run", 60)
        described(group, "blank:1:web:name=web;mem=48\n")
        group.run("vmapply", "-f", file, "-y", "--restart").ok()
        nothing_to_do(group, file)
        add_blank(group, "other")
        described(group, "other:1:web:name=web\n")
        group.run("vmapply", "-f", file, "-y", "--replace").ok()
        eventually(lambda: "web00 has joined" in run.out.read_text(), "it sees the new one", 60)
    finally:
        run.signal(signal.SIGTERM)
        run.ends(0)
    out = run.out.read_text()
    assert out.startswith("create web00\ncreate web01\n") and "web01 has vanished" in out
    assert states(group) == {"web00": "stopped"}, "kept"


def test_full_names(group: Cloud) -> None:
    """On the command line, too; each only once, and a VM is no template."""
    group.run("vminstantiate", "-n", "blank", "-g", "pf", "-C2", "-o", "name=front,b-1").ok()
    assert list(states(group)) == ["b-1", "front"]
    again = group.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=Front,")
    again.says(2, "name=Front: there is such a VM in the group", "choose another name")
    told = group.run("vminstantiate", "-n", "pf/default/front", "--dry-run")
    told.says(2, "pf/default/front is a VM, not a template", "vmtemplate NAME --from pf/default/front makes one of it")
    group.run("vminstantiate", "-n", "blank", "-C2", "-o", "name=x,").fails(2, "-o: name=x,: 1 name for a COUNT of 2")
    assert list(states(group)) == ["b-1", "front"]


# Descriptions of what there is #######################################################################


NAMES = st.one_of(st.from_regex("(web|w1|db)[0-9]{1,3}", fullmatch=True), st.sampled_from(["front", "a-1", U1, U2, U3]))
VMS = st.fixed_dictionaries({
    "type": st.sampled_from(["web", "sql"]), "template": st.sampled_from(["deb", "new"]),
    "mem": st.sampled_from(["512", "1024"]), "gui": st.sampled_from(["", "yes"]), "cap": st.sampled_from(["", "20"]),
    "port": st.sampled_from(["", "127.0.0.1:8080:80", "127.0.0.1:8081:80", "0.0.0.0:65535:1"]),
    "sizes": st.sampled_from([[0], [1], [0, 1], [2, 1, 3]]), "more": st.sampled_from(["", "-cpu x"]),
})  # fmt: skip


def disk(path: Path, gigabytes: float) -> None:
    """The header of a qcow2 disk."""
    size = int(gigabytes * GIB).to_bytes(8, "big")
    path.write_bytes(b"QFI\xfb" + bytes([0, 0, 0, 3]) + bytes(12) + bytes([0, 0, 0, 16]) + size + bytes(80))


def write_vm(base: Path, place: str, conf: Mapping[str, str], sizes: list[float]) -> None:
    folder = base / place
    folder.mkdir(parents=True)
    names = [f"{place}/{folder.name}_{number}.img" for number in range(len(sizes))]
    for name, size in zip(names, sizes):
        disk(base / name, size)
    disks = {"vmDisk": names[0], "vmExtraDisk": ",".join(names[1:]), "vmDiskFormat": ",".join(["qcow2"] * len(names))}
    text = nocloud.update_assignments("", {"vmName": folder.name, **disks, **conf})
    (folder / f"{folder.name}.conf").write_text(text)
    (folder / f"{folder.name}.command").touch()


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(NAMES, VMS, min_size=1, max_size=9))
def test_what_is_described_is_so(tmp_path_factory: pytest.TempPathFactory, vms: dict[str, dict[str, object]]) -> None:
    base = tmp_path_factory.mktemp("tree")
    for name in ("deb", "new"):
        write_vm(base, f"templates/{name}", {"vmMem": "512", "vmCpu": "1"}, [0.5])
    names: dict[str, dict[str, object]] = {name.lower(): each for name, each in vms.items()}
    for name, each in names.items():
        keys = {"mem": "vmMem", "gui": "vmGui", "cap": "vmCpuCap", "port": "vmPorts", "more": "vmExtraOpts"}
        conf = {key: str(each[option]) for option, key in keys.items()} | {"vmCpu": "1"}
        own = {"vmTemplate": str(each["template"]), "vmUuid": name if name.count("-") == 4 else U1}
        sizes = [float(size) or 0.5 for size in each["sizes"]]  # type: ignore[attr-defined]
        write_vm(base, f"pf/{each['type']}/{name}", {**conf, **own}, sizes)
    cloud = nocloud.Cloud(tree_at(base).config)
    found = list(nocloud.describe(cloud, "pf"))
    text = "\r\n".join(found).replace(":", " :\t", 2)
    requests = nocloud.parse_description(text, "FILE", "default")
    assert sum(request.count for request in requests) == len(names)
    steps = nocloud.plan(
        requests,
        [nocloud.look(vm) for vm in cloud.tree.vms("pf")],
        {name: nocloud.look(cloud.tree.need_template(name)) for name in ("deb", "new")},
    )
    assert {step.verb for step in steps} == {"keep"}, (found, [step.line for step in steps])
    assert sum("vmExtraOpts" in line for line in found) == sum(each["more"] == "-cpu x" for each in names.values())


def test_a_group_as_a_file(group: Cloud) -> None:
    for words in (("-C3", "-o", "name=web"), ("-o", "name=x;dsk=1;port=0:80"), ("-t", "sql", "-C2", "-o", "mem=48")):
        group.run("vminstantiate", "-n", "blank", "-g", "pf", *words).ok()
    group.run("vmstop", "-d", "-n", "web01").ok()
    group.run("vmstop", "-n", "x00", "--kill").ok()
    told = group.run("vmapply", "--describe", "-g", "pf").ok()
    port = group.conf("pf/default/x00")["vmPorts"].removeprefix("127.0.0.1:")
    assert told.lines == [
        "blank:2:default:name=web00,web02",
        f"blank:1:default:name=x;dsk=1;port={port}",
        "blank:2:sql:mem=48",
    ]
    nothing_to_do(group, described(group, told.stdout))
    group.run("vmapply", "--describe", "-g", "pg").fails(1, "pg: no such group")
    group.run("vmapply", "--describe").fails(2, "-g GROUP is missing")


# One VM ##############################################################################################


@pytest.mark.long
def test_change_one(group: Cloud) -> None:
    group.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
    conf = group.conf("pf/default/web00")
    for words in (["-m", 48], ["--name", "front"], ["--remove-disk", 1, "-y"]):
        assert "web00: it is running" in group.run("vmchange", "web00", *words).stderr
    assert group.conf("pf/default/web00") == conf
    group.run("vmchange", "web00", "-d", 1, "--add-disk", 1, "--ports", "127.0.0.1:0:80").quiet()
    now = group.conf("pf/default/web00")
    assert now["vmPlugged"] == "1" and now["vmPorts"].endswith(":80")
    assert "web00_1.img" in group.run("vmmanage", "-n", "web00", "info", "block").ok().stdout
    group.run("vmstop", "--save", "-n", "web00").quiet()
    group.start("web00").ok()  # it goes on, with the disk that was plugged in
    group.run("vmsnapshot", "one", "-n", "web00").quiet()
    group.run("vmstop", "-n", "web00", "--kill").ok()
    assert "its snapshots have that disk, too" in group.run("vmchange", "web00", "--remove-disk", 1, "-y").stderr
    group.run("vmchange", "web00", "--name", "x").fails(1, "a VM with snapshots, stays what it is called")
    group.run("vmsnapshot", "--delete", "one", "-n", "web00").quiet()
    group.run("vmchange", "-n", "web00", "-m", 48, "-c", 2, "-C", 20, "--add-disk", 2, "--ports", "").quiet()
    now = group.conf("pf/default/web00")
    assert (now["vmMem"], now["vmCpu"], now["vmCpuCap"], now["vmPorts"]) == ("48", "2", "20", "")
    assert now["vmExtraDisk"].count(",") == 1
    assert group.run("vmchange", "web00", "--remove-disk", 1).status == 1
    group.run("vmchange", "web00", "--remove-disk", 1, "-y").ok()
    assert group.conf("pf/default/web00")["vmExtraDisk"] == "pf/default/web00/web00_2.img"
    assert "it has no disk 2" in group.run("vmchange", "web00", "--remove-disk", 2, "-y").stderr
    group.run("vmchange", "web00").fails(2, "nothing to change")
    group.run("vmchange").fails(2, "VM is missing")
    group.start("web00").ok()
    assert group.conf("pf/default/web00")["vmUuid"] == conf["vmUuid"]


def test_another_name_and_place(group: Cloud) -> None:
    group.run("vminstantiate", "-n", "blank", "-g", "pf", "-C2", "-o", "name=web;dsk=1").ok()
    old = group.conf("pf/default/web00")
    group.run("vmchange", "web00", "--name", "front").says(1, "web00: it is running", "vmstop -n web00")
    group.run("vmstop", "-n", "web00", "--kill").ok()
    for words, said in (
        (["--name", "web01"], "pf: there is a VM web01 in it"),
        (["--name", "a/b"], "'/' is not allowed in a VM name"),
        (["--group", "templates"], "'templates' is reserved"),
    ):
        group.run("vmchange", "web00", *words).fails(2, said)
    group.run("vmchange", "web00", "--name", "front", "--group", "shop", "--type", "sql").quiet()
    now = group.conf("shop/sql/front")
    assert (now["vmDisk"], now["vmExtraDisk"]) == ("web00_0.img", "web00_1.img")
    assert {key: now[key] for key in old if key not in ("vmName", "vmDisk", "vmExtraDisk")} == {
        key: old[key] for key in old if key not in ("vmName", "vmDisk", "vmExtraDisk")
    }
    assert not [name for name in group.files() if "pf/default/web00" in name or name.endswith("web00.conf")]
    assert not [
        path for path in (group.base / ".net").rglob("*") if path.is_file() and "web00" in path.read_text("latin1")
    ]
    group.run("vmssh", "web00", "true").fails(1, "web00: no such VM")
    group.start("front").ok()
    assert "front.shop" in group.run("vmrunning", "--json").ok().stdout or "front" in group.run("vmrunning").ok().stdout
    group.run("vmstop", "-n", "front", "--kill").ok()
    group.run("vmchange", "front", "--group", "pf", "--type", "default", "--name", "web00").quiet()
    assert group.conf("pf/default/web00")["vmUuid"] == old["vmUuid"] and "shop" not in group.groups()


def test_what_fails_costs_nothing(group: Cloud) -> None:
    one, other = free_port(), free_port()
    for name, port in (("web", one), ("db", other)):
        options = f"name={name};dsk=1;port={port}:80"
        group.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", options).ok()
    group.run("vmchange", "web00", "--ports", f"{other}:80").fails(1, str(other))
    shown = group.run("vmport", "-L").ok().stdout
    for port in (one, other):
        assert f"127.0.0.1:{port} 80" in shown and f"127.0.0.1:{port}" in listening(group)
    group.run("vmstop", "-g", "pf", "--kill").ok()
    before = group.conf("pf/default/web00"), group.files()
    taken = group.run("vmchange", "web00", "--remove-disk", 1, "-m", 48, "--name", "db00", "-y")
    assert taken.status == 2 and "there is a VM db00" in taken.stderr
    group.run("vmchange", "web00", "-m", 48, "--type", "a b").fails(2, "' ' is not allowed")
    group.run("vmchange", "web00", "--remove-disk", 2, "-y").says(
        2, "web00: it has no disk 2", "it has 2 disks, the first one is 0"
    )
    assert (group.conf("pf/default/web00"), group.files()) == before


def test_a_port_of_one_that_goes_is_had_by_one_that_comes(group: Cloud) -> None:
    port = free_port()
    file = described(group, f"blank:1:web:name=old;port={port}:80\n")
    group.run("vmapply", "-f", file).ok()
    described(group, f"blank:1:web:name=new;port={port}:80\n")
    assert group.run("vmapply", "-f", file, "-y").ok().lines == ["destroy old00", "create new00"]
    assert f"127.0.0.1:{port}" in listening(group)
    described(group, "blank:1:web:name=new\nnothere:1\n")
    group.run("vmapply", "-f", file).fails(1, ":2: nothere: no such template")


def test_one_that_bash_made_stays_off_and_can_be_moved(group: Cloud) -> None:
    file = described(group, "blank:1:web:name=web\n")
    group.run("vmapply", "-f", file).ok()
    group.run("vmstop", "-n", "web00", "--kill").ok()
    name = next(path for path in group.base.rglob("web00.conf"))
    kept = [
        line
        for line in name.read_text().splitlines()
        if line.split("=")[0] in ("vmName", "vmDisk", "vmMem", "vmTemplate")
    ]
    name.write_text("\n".join(kept) + "\n")
    name.with_suffix(".command").unlink()
    assert not [line for line in group.run("vmapply", "-f", file, "--dry-run").lines if line.startswith("start")]
    group.run("vmchange", "web00", "--name", "front", "--group", "shop").quiet()
    assert group.conf("shop/web/front")["vmName"] == "front"


# Guests ##############################################################################################


def answers(cloud: Cloud, vm: str) -> bool:
    """Whether its ssh server says its banner."""
    return "SSH-2.0" in cloud.run("net", "connect", cloud.conf(vm)["vmAddress"], 22, input="").stdout


@pytest.mark.long
def test_a_rolling_restart(tiny: Cloud) -> None:
    """Whoever asks finds one of the VMs at any time; what they are given while they run, they see."""
    file = described(tiny, "tiny:2:web:name=web\n")
    tiny.run("vmapply", "-f", file, "-w", READY).ok()
    described(tiny, "tiny:2:web:name=web;disk=3;dsk=2\n")
    tiny.run("vmapply", "-f", file).ok()
    for name in ("web00", "web01"):
        seen = "cat /sys/block/vda/size /sys/block/vdb/size; cat /sys/block/vdb/serial"
        assert tiny.ssh(name, seen).ok().lines == [str(3 << 21), str(2 << 21), f"{name}_1"]
    described(tiny, "tiny:2:web:name=web;disk=3;dsk=2;mem=128\n")
    names = [f"pf/web/{name}" for name in ("web00", "web01")]
    old = {name: tiny.qemu(name) for name in names}
    applying = tiny.spawn("vmapply", "-f", file, "--restart", "-w", READY)
    asked = 0
    while applying.poll() is None:
        assert any(answers(tiny, name) for name in [*names, *names]), "all are down"
        asked += 1
    out, err = applying.communicate()
    assert applying.returncode == 0 and asked > 3, (out, err)
    assert all(tiny.qemu(name) != old[name] for name in names)
    memory = tiny.ssh("web01", "awk '/MemTotal/ { print $2 }' /proc/meminfo").ok().stdout
    assert 84 * 1024 < int(memory) <= 128 * 1024
    nothing_to_do(tiny, file)


@pytest.mark.long
def test_a_guest_with_another_name(tiny: Cloud) -> None:
    """It is the same machine, and nothing knows the old name any more."""
    tiny.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-C2", "-o", "name=web", "-w", READY).ok()
    tiny.script("with nocloud.Cloud(nocloud.load_config()) as cloud: nocloud.SshConfig(cloud).write()").ok()
    keys = (tiny.base / ".known_hosts").read_text()
    tiny.ssh("web00", "echo here > /tmp/kept; sync").ok()
    tiny.run("vmstop", "-n", "web00").ok()
    tiny.run("vmchange", "web00", "--name", "front", "--type", "edge").quiet()
    tiny.start("front").ok()
    assert tiny.ssh("front", "hostname").ok().stdout == "front\n"
    assert sorted((tiny.base / ".known_hosts").read_text().splitlines()) == sorted(keys.splitlines())
    for text in (
        (tiny.base / ".ssh_config").read_text(),
        tiny.run("vminventory", "--list").ok().stdout,
        tiny.run("vmrunning", "-a").ok().stdout,
        "".join(path.read_text() for path in (tiny.base / ".net").rglob("hosts/*")),
    ):
        assert "front" in text and "web00" not in text, text
    found = tiny.run("net", "exec", "getent", "hosts", "front.pf", "web00.pf").stdout
    assert found.split()[0] == tiny.conf("pf/edge/front")["vmAddress"] and "web00" not in found


# Hostile days ########################################################################################


@pytest.mark.long
def test_killed_at_any_instant(group: Cloud, survived: Callable[[str, int], None]) -> None:
    """Called again it ends where it should, and what is on a disk that stays is there."""
    seed = int(os.environ.get("SEED") or time.time_ns() % 10**9)
    print(f"SEED={seed}")
    random, rounds, longest = Random(seed), int(os.environ.get("ROUNDS") or 50), 0.0
    one = "blank:1:db:name=db;dsk=1\nblank:2:web:name=web\n"
    other = "blank:1:db:name=db;dsk=1;mem=48\nblank:3:web:name=web;dsk=1\n"
    file = described(group, one)
    group.run("vmapply", "-f", file).ok()
    group.run("vmstop", "-g", "pf", "--kill").ok()
    data = group.folder("pf/db/db00") / "db00_1.img"
    group.execute(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 64k", data]).ok()
    group.start("db00", "web00", "web01").ok()
    uuid = uuids(group)["db00"]
    for number in range(rounds):
        described(group, one if number % 2 else other)
        started = time.monotonic()
        child = group.spawn("vmapply", "-f", file, "--restart", "-y")
        with suppress(subprocess.TimeoutExpired):  # the first rounds tell how long it takes
            child.wait(random.uniform(0.05, longest) if number > 1 else 60)
        longest = max(longest, min(time.monotonic() - started, 60))
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        done = group.run("vmapply", "-f", file, "--restart", "-y").ok()
        assert set(states(group).values()) == {"running"}, (repr(done), states(group))
        assert group.run("vmapply", "-f", file, "--dry-run").ok().lines == ["nothing to do"], done
        assert list(states(group)) == ["db00", "web00", "web01", *([] if number % 2 else ["web02"])]
        read = group.execute(["qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read -q -P 7 0 64k", data]).ok()
        assert not read.stdout and uuids(group)["db00"] == uuid
        assert not [name for name in group.files() if ".apply-" in name or ".new-" in name or ".del-" in name]
    survived("SIGKILL of vmapply", rounds)
