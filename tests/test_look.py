"""Looking at VMs: what --json and -l say of them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from typing import Any

import pytest
from support import READY, Cloud, eventually

VM = "pf/web/web00"


@pytest.fixture(scope="module")
def web(shared: Cloud) -> Cloud:
    """pf/web/web00, a tiny guest that is ready, with a port."""
    options = "name=web;port=0:80"
    shared.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-o", options, "-w", READY).ok()
    return shared


# Facts ###############################################################################################


def facts(cloud: Cloud, *words: str) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = json.loads(cloud.run("vmrunning", "--json", *words).ok().stdout)
    return answer


def test_json_of_a_vm_that_is_stopped(blank: Cloud) -> None:
    """Each key is there; what a VM that doesn't run hasn't is null."""
    assert facts(blank) == []
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web;port=0:80").ok()
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    assert facts(blank) == []
    conf, disk = blank.conf(VM), blank.folder(VM) / "web00_0.img"
    template, vm = sorted(facts(blank, "-a"), key=lambda each: str(each["group"]), reverse=True)
    assert vm == {
        "name": "web00",
        "group": "pf",
        "type": "web",
        "state": "stopped",
        "stage": None,
        "address": conf["vmAddress"],
        "template": "blank",
        "user": "root",
        "uuid": conf["vmUuid"],
        "mac": conf["vmMac"],
        "network": "private",
        "ports": [{"ip": "127.0.0.1", "host": int(conf["vmPorts"].split(":")[1]), "guest": 80}],
        "mem_mb": 32,
        "cpus": 1,
        "pid": None,
        "uptime_seconds": None,
        "cpu_seconds": None,
        "resident_bytes": None,
        "disk_bytes": disk.stat().st_blocks * 512,
        "folder": str(blank.folder(VM)),
    }
    assert set(template) == set(vm)
    assert (template["name"], template["type"], template["template"], template["ports"]) == ("blank", None, None, [])


def test_json_of_a_vm_that_runs(web: Cloud) -> None:
    pid = web.qemu(VM)
    (vm,) = facts(web, "-g", "pf")
    assert (vm["state"], vm["stage"], vm["pid"], vm["cpus"], vm["mem_mb"]) == ("running", "ready", pid, 1, 96)
    assert 0 < vm["uptime_seconds"] < time.time() - (web.folder(VM) / "web00.conf").stat().st_ctime + 5
    assert 0 < vm["cpu_seconds"] < os.cpu_count() * vm["uptime_seconds"]
    assert 10 << 20 < vm["resident_bytes"] < 1 << 30
    assert facts(web, "-g", "pf", "-t", "web")[0]["uptime_seconds"] > vm["uptime_seconds"]
    web.run("vmmanage", "-n", "web00", "stop").ok()
    assert [each["state"] for each in facts(web)] == ["paused"]
    web.run("vmmanage", "-n", "web00", "cont").ok()


def test_stage_is_of_this_start(blank: Cloud) -> None:
    """Whoever has seen it ready; nobody has since it was started again."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    assert [each["stage"] for each in facts(blank)] == [None]
    (blank.folder(VM) / "ready").touch()
    assert [each["stage"] for each in facts(blank)] == ["ready"]
    blank.run("vmstop", "--kill", "-g", "pf").quiet()
    blank.start(VM).ok()
    assert [each["stage"] for each in facts(blank)] == [None]


def test_json_of_what_can_not_be_read(blank: Cloud) -> None:
    """It is listed all the same."""
    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-t", "web", "-o", "name=web").ok()
    conf = blank.folder(VM) / "web00.conf"
    text = conf.read_text()
    conf.write_text("vmMem=much\n")
    done = blank.run("vmrunning", "--json", "-g", "pf").ok()
    (vm,) = json.loads(done.stdout)
    assert "vmMem" in done.stderr
    assert (vm["name"], vm["state"], vm["pid"]) == ("web00", "running", blank.qemu(VM))
    assert (vm["mem_mb"], vm["address"], vm["ports"], vm["disk_bytes"]) == (None, None, [], 0)
    row = blank.run("vmrunning", "-l", "-g", "pf").ok().stdout
    assert row.split()[:4] == ["web00", "pf/web", "running", "-"]
    conf.write_text(text)


def table(cloud: Cloud, *words: str) -> list[list[str]]:
    """The cells of each row."""
    return [re.split(" {2,}", line) for line in cloud.run("vmrunning", "-l", *words).ok().lines]


def test_long_list(web: Cloud) -> None:
    (name, place, state, address, uptime, load, memory, port), (template, *rest) = table(web, "-a")
    assert (name, place, state, address) == ("web00", "pf/web", "running", web.conf(VM)["vmAddress"])
    hours, minutes, seconds = map(int, uptime.split(":"))
    assert 0 < 3600 * hours + 60 * minutes + seconds < 3600 and load.endswith("%")
    assert memory.endswith(" MB") and int(memory.split()[0]) > 10
    assert port == web.conf(VM)["vmPorts"]
    assert (template, *rest) == ("tiny", "templates", "stopped", "-", "-", "-", "-", "-")


def test_long_list_shows_what_is_used_now(web: Cloud) -> None:
    """A guest that computes, and one that can't: its qemu is stopped."""
    busy = web.spawn("vmssh", "web00", "while :; do :; done")
    eventually(lambda: int(table(web)[0][5].strip("%")) > 5, "the guest computes", 60)
    pid = web.qemu(VM)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert table(web)[0][5] == "0%"
    finally:
        os.kill(pid, signal.SIGCONT)
    busy.kill()
    web.ssh("web00", "killall -9 sh ash; true")


def test_one_form_at_a_time(web: Cloud) -> None:
    web.run("vmrunning", "-l", "--json").says(2, "--long and --json exclude each other")
