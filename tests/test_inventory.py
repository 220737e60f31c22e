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


def ansible(cloud: Cloud, name: str, *words: object, env: dict[str, str] | None = None, timeout: float = 150) -> Result:
    """A program of ansible, with vminventory as it is installed: a link named so."""
    folder = cloud.home / "links"
    if not folder.exists():
        folder.mkdir()
        cloud.run("links", folder).ok()
    env = {
        **(env or {}),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",  # a shared connection would outlive the test
        "ANSIBLE_DEPRECATION_WARNINGS": "False",
        "PATH": f"{Path(program(name)).parent}:{cloud.env['PATH']}",
    }
    return cloud.execute([program(name), "-i", folder / "vminventory", *words], env=env, timeout=timeout)


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
    assert known["type_web"] == {"children": ["pf_web", "two_web"]} and known["type_sql"] == {"children": ["pf_sql"]}
    groups = {"pf", "pf_web", "pf_sql", "two", "two_web", "templates", "templates_templates", "type_web", "type_sql"}
    assert set(known) == {*groups, "_meta"}
    assert known["pf"]["vars"] == {"ansible_user": "root"}

    hosts = known["_meta"]["hostvars"]
    for values in hosts.values():
        args = values["ansible_ssh_common_args"]
        assert str(blank.base / ".known_hosts") in args and "ProxyCommand" in args
        assert values["ansible_port"] == 22 and f"-o HostKeyAlias={values['nocloud_uuid']} " in args
        assert "ansible_host" not in values
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
    for group in ("pf_web", "templates_templates", "type_web"):
        assert f"@{group}:" in graph.stdout
    assert "WARNING" not in graph.stderr

    check_names(blank, hosts, address)

    blank.run("vmstop", "--kill", "-g", "two").quiet()
    assert "two" not in inventory(blank)
    blank.run("vmstop", "--kill", "-g", "templates").quiet()


def check_names(blank: Cloud, hosts: dict[str, Any], address: dict[str, str]) -> None:
    """With vmInventoryHosts=name the same hosts have names, of which no two are one."""
    named = {"NOCLOUD_vmInventoryHosts": "name"}
    known = json.loads(blank.run("vminventory", "--list", env=named).ok().stdout)
    assert known["pf_web"] == {"hosts": ["web00.pf", "web01"]} and known["two_web"] == {"hosts": ["web00.two"]}
    assert known["templates_templates"] == {"hosts": ["other"]}
    for name, values in known["_meta"]["hostvars"].items():
        full = f"{values['nocloud_group']}/{values['nocloud_type']}/{values['nocloud_name']}"
        assert values.pop("ansible_host") == address[full.replace("templates/templates", "templates")], name
        assert values in hosts.values()
    shown = blank.run("vminventory", "--host", "web01", env=named).ok().stdout
    assert json.loads(shown)["ansible_host"] == address["pf/web/web01"]
    blank.run("vminventory", env={"NOCLOUD_vmInventoryHosts": "x"}).fails(2, "vmInventoryHosts", "address, name")


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


def test_nothing_of_a_playbook_or_of_the_user_takes_the_way_in_away(guests: Cloud) -> None:
    """A role's copy over sftp too, with group_vars of its own; hosts are names, and have host_vars."""
    play = guests.home / "play"
    for folder in ("group_vars", "host_vars", "roles/one/tasks"):
        (play / folder).mkdir(parents=True)
    (play / "group_vars/all.yml").write_text(
        "ansible_ssh_common_args: -o ProxyJump=192.0.2.1\nansible_port: 2222\nwhat: all\n"
    )
    (play / "host_vars/web01.yml").write_text("what: one\n")
    (play / "roles/one/tasks/main.yml").write_text("- ansible.builtin.raw: echo {{ what }} >/tmp/{{ nocloud_name }}\n")
    (play / "site.yml").write_text("- hosts: type_web\n  gather_facts: false\n  roles: [one]\n")
    named = {"NOCLOUD_vmInventoryHosts": "name"}
    done = ansible(guests, "ansible-playbook", "--limit", "web01", play / "site.yml", env=named).ok()
    assert "web01 " in done.stdout and "web00" not in done.stdout
    assert guests.ssh("web01", "cat /tmp/web01").ok().stdout == "one\n"
    for env in (named, {}):  # both kinds of hosts
        ansible(guests, "ansible-playbook", play / "site.yml", env=env).ok()
        assert guests.ssh("web00", "cat /tmp/web00; rm /tmp/web00").ok().stdout == "all\n"


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


@pytest.mark.long
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
