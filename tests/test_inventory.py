"""The inventory: strict JSON, and what the real ansible-core makes of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import READY, Cloud, Result, add_blank


def program(name: str) -> str:
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not path:
        pytest.fail(f"{name} is not installed: make test installs what the tests need")
    return path


def inventory(cloud: Cloud) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    answer: dict[str, Any] = json.loads(cloud.run("vminventory", "--list").ok().stdout, parse_constant=refuse)
    return answer


def ansible(cloud: Cloud, name: str, *words: object) -> Result:
    """A program of ansible, with vminventory as it is installed: a link named so."""
    folder = cloud.home / "links"
    if not folder.exists():
        folder.mkdir()
        cloud.run("links", folder).ok()
    env = {
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",  # a shared connection would outlive the test
        "ANSIBLE_DEPRECATION_WARNINGS": "False",
        "PATH": f"{Path(program(name)).parent}:{cloud.env['PATH']}",
    }
    return cloud.execute([program(name), "-i", folder / "vminventory", *words], env=env)


def test_an_empty_cloud(cloud: Cloud) -> None:
    assert inventory(cloud) == {"_meta": {"hostvars": {}}}
    assert json.loads(cloud.run("vminventory", "--host", "10.88.0.2").ok().stdout) == {}
    assert cloud.run("vminventory").ok().stdout == ""


def test_groups_types_templates_and_users(blank: Cloud) -> None:
    image = blank.home / "blank.qcow2"
    blank.run("vmtemplate", "anns", "--image", image, "--mem", 32, "--cpu", 1, "--user", "ann", "--init", "none").ok()
    for words in (("pf", "web", 2), ("pf", "sql", 1), ("two", "web", 1)):
        blank.run(
            "vminstantiate", "-n", "blank", "-g", words[0], "-t", words[1], "-C", words[2], "-o", f"name={words[1]}"
        ).ok()
    blank.run("vminstantiate", "-n", "anns", "-g", "pf", "-t", "sql", "-o", "name=ann").ok()
    add_blank(blank, "other")
    blank.start("templates/other").ok()
    address = {}
    for name in ("pf/web/web00", "pf/web/web01", "pf/sql/sql00", "pf/sql/ann00", "two/web/web00", "templates/other"):
        address[name] = blank.conf(name)["vmAddress"]
    known = inventory(blank)
    assert known["pf_web"] == {"hosts": [address["pf/web/web00"], address["pf/web/web01"]]}
    assert known["pf_sql"] == {"hosts": [address["pf/sql/ann00"], address["pf/sql/sql00"]]}
    assert sorted(known["pf"]["children"]) == ["pf_sql", "pf_web"]
    assert known["two"]["children"] == ["two_web"]
    assert known["templates"]["children"] == ["templates_templates"]
    assert known["templates_templates"] == {"hosts": [address["templates/other"]]}
    assert set(known) == {"pf", "pf_web", "pf_sql", "two", "two_web", "templates", "templates_templates", "_meta"}
    assert known["pf"]["vars"]["ansible_user"] == "root"
    args = known["pf"]["vars"]["ansible_ssh_common_args"]
    assert str(blank.base / ".known_hosts") in args and "ProxyCommand" in args

    hosts = known["_meta"]["hostvars"]
    assert set(hosts) == set(address.values())
    conf = blank.conf("pf/sql/ann00")
    ann = hosts[address["pf/sql/ann00"]]
    assert ann["ansible_user"] == "ann" and "ansible_user" not in hosts[address["pf/sql/sql00"]]
    for value in ("ann00", "pf", "sql", "anns", conf["vmUuid"]):
        assert value in ann.values()
    assert json.loads(blank.run("vminventory", "--host", address["pf/sql/ann00"]).ok().stdout) == ann

    assert blank.run("vminventory").ok().stdout == blank.run("vmrunning").ok().stdout
    assert blank.run("vmrunning").ok().lines == [
        f"ann00 pf/sql {address['pf/sql/ann00']}",
        f"sql00 pf/sql {address['pf/sql/sql00']}",
        f"web00 pf/web {address['pf/web/web00']}",
        f"web01 pf/web {address['pf/web/web01']}",
        f"web00 two/web {address['two/web/web00']}",
        f"other templates {address['templates/other']}",
    ]

    shown = json.loads(ansible(blank, "ansible-inventory", "--list").ok().stdout)
    assert set(shown["_meta"]["hostvars"]) == set(address.values())
    assert shown["_meta"]["hostvars"][address["pf/sql/ann00"]]["ansible_user"] == "ann"
    graph = ansible(blank, "ansible-inventory", "--graph").ok()
    assert "@pf_web:" in graph.stdout and "@templates_templates:" in graph.stdout
    assert "WARNING" not in graph.stderr

    blank.run("vmstop", "--kill", "-g", "two").quiet()
    assert "two" not in inventory(blank)
    blank.run("vmstop", "--kill", "-g", "templates").quiet()


@pytest.fixture(scope="module")
def guests(shared: Cloud) -> Iterator[Cloud]:
    shared.run("vminstantiate", "-n", "tiny", "-g", "pf", "-t", "web", "-C", 2, "-o", "name=web", "-w", READY).ok()
    yield shared


def test_ansible_reaches_all(guests: Cloud) -> None:
    done = ansible(guests, "ansible", "all", "-m", "raw", "-a", "hostname").ok()
    assert "web00" in done.stdout and "web01" in done.stdout
    assert done.stdout.count("rc=0") == 2
    done = ansible(guests, "ansible", "pf_web", "-m", "raw", "-a", "true").ok()
    assert done.stdout.count("rc=0") == 2


def test_ansible_checks_host_keys(guests: Cloud) -> None:
    """Strictly, though the addresses are what it names; the user's known_hosts plays no part."""
    file = guests.base / ".known_hosts"
    good = file.read_text()
    lines = good.splitlines()
    names = [line.split(" ", 1)[0] for line in lines]
    keys = [line.split(" ", 1)[1] for line in lines]
    file.write_text(f"{names[0]} {keys[1]}\n{names[1]} {keys[1]}\n")  # web00's line has web01's key
    done = ansible(guests, "ansible", "all", "-m", "raw", "-a", "true")
    file.write_text(good)
    assert done.status != 0 and done.stdout.count("rc=0") == 1, repr(done)
    assert not (guests.home / ".ssh/known_hosts").exists()


def test_a_vm_without_an_address_is_left_out(cloud: Cloud, vms: None) -> None:
    """On the bridge the address comes by DHCP, later."""
    add_blank(cloud)
    cloud.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
    conf = cloud.base / "pf/default/web00/web00.conf"
    text = "".join(
        line for line in conf.read_text().splitlines(True) if not line.startswith(("vmAddress", "vmNetwork"))
    )
    conf.write_text(text + "vmNetwork=bridge\n")
    empty = {"NOCLOUD_bridgeLeases": "/dev/null"}
    assert cloud.run("vmrunning", env=empty).ok().stdout == "web00 pf/default\n"
    assert json.loads(cloud.run("vminventory", "--list", env=empty).ok().stdout) == {"_meta": {"hostvars": {}}}
    leases = cloud.home / "leases"
    leases.write_text(f"1 {cloud.conf('pf/default/web00')['vmMac']} 192.168.1.77 web00 *\n")
    assert (
        cloud.run("vmrunning", env={"NOCLOUD_bridgeLeases": str(leases)}).ok().stdout
        == "web00 pf/default 192.168.1.77\n"
    )
