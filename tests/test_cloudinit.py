"""cloud-init's seeds: what is in them, how they are attached, and guests that take them."""

from __future__ import annotations

import email
import functools
import gzip
import importlib
import json
import os
import re
import shutil
import stat
import string
import subprocess
from collections.abc import Iterator, Sequence
from email.message import Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    READY,
    Cloud,
    Result,
    add_template,
    eventually,
    keyed_image,
    link_programs,
    nothing_made,
    pids,
    proc_words,
    tree_at,
    without_waits,
)
from test_lifecycle import secrets

import nocloud

yaml: Any = importlib.import_module("yaml")  # ansible has it; it brings no types

MIB = 1 << 20
UUID = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
PRIVATE = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\n"


def fake_clone(base: Path, name: str = "web00", user: str = "root", comment: str = "root@web00") -> nocloud.VM:
    vm = nocloud.VM(tree_at(base), "pf", "web", name)
    Path(vm.folder).mkdir(parents=True, exist_ok=True)
    mac = nocloud.mac_of_uuid(UUID)
    vm.write_conf({"vmName": name, "vmUser": user, "vmUuid": UUID, "vmMac": mac, "vmInit": "cloud-init"})
    Path(vm.host_key).write_text(PRIVATE)
    Path(vm.host_key + ".pub").write_text(f"ssh-ed25519 AAAAhost {comment}\n")
    return vm


def cloud_config(files: dict[str, bytes]) -> dict[str, Any]:
    """What the seed alone makes of a guest, by its YAML and by its JSON, which are one."""
    boothook, *found = parts(files["user-data"])
    assert boothook.get_content_type() == "text/cloud-boothook"
    for part in found:
        data = part.get_payload(decode=True)
        assert isinstance(data, bytes) and yaml.safe_load(data) == json.loads(data.partition(b"\n")[2])
    return merged(found)


# The seed ############################################################################################


def test_what_a_seed_says(tmp_path: Path) -> None:
    files = nocloud.seed_files(fake_clone(tmp_path), ["ssh-ed25519 AAAA one", "ssh-rsa BBBB"])
    assert yaml.safe_load(files["meta-data"]) == {"instance-id": UUID, "local-hostname": "web00"}
    assert yaml.safe_load(files["network-config"]) == {
        "version": 2,
        "ethernets": {
            "eth0": {
                "match": {"macaddress": "00:50:56:6b:a7:b8"},
                "set-name": "eth0",
                "dhcp4": True,
                "dhcp-identifier": "mac",
            }
        },
    }
    assert cloud_config(files) == {
        "hostname": "web00",
        "fqdn": "web00.pf.nocloud",
        "preserve_hostname": False,
        "prefer_fqdn_over_hostname": False,
        "manage_etc_hosts": "localhost",
        "disable_root": False,
        "ssh_authorized_keys": ["ssh-ed25519 AAAA one", "ssh-rsa BBBB"],
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": PRIVATE, "ed25519_public": "ssh-ed25519 AAAAhost root@web00"},
        "growpart": {"mode": "auto", "devices": ["/"]},
        "resize_rootfs": True,
        "package_update": False,
        "package_upgrade": False,
    }


def test_another_login_is_the_default_user(tmp_path: Path) -> None:
    config = cloud_config(nocloud.seed_files(fake_clone(tmp_path, user="debian"), ["ssh-rsa A"]))
    assert config["user"] == {"name": "debian"} and "disable_root" not in config


LABEL = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", fullmatch=True)
COMMENT = st.text(st.characters(exclude_characters="\n\r"), max_size=60)


@given(LABEL, st.lists(COMMENT, max_size=4), COMMENT)
def test_nothing_in_a_name_or_a_key_is_more_than_text(
    tmp_path_factory: pytest.TempPathFactory, name: str, comments: list[str], own: str
) -> None:
    """yes, 0x10 and 1e3 are names, too; a comment may hold quotes, colons, control and astral characters."""
    base = tmp_path_factory.getbasetemp() / "names"
    printable = own.encode("ascii", "replace").decode()  # our own key's comment is ours
    vm = fake_clone(base, name, comment=printable)
    keys = [f"ssh-ed25519 AAAA{number} {comment}" for number, comment in enumerate(comments)]
    files = nocloud.seed_files(vm, keys)
    assert all(set(text.decode()) <= set(string.printable) for text in files.values())
    config = cloud_config(files)
    assert config["hostname"] == name == yaml.safe_load(files["meta-data"])["local-hostname"]
    assert [key.split(" ")[:2] for key in config["ssh_authorized_keys"]] == [key.split(" ")[:2] for key in keys]
    assert config["ssh_keys"]["ed25519_private"] == PRIVATE
    assert set(config) == set(cloud_config(nocloud.seed_files(vm, [])))


def test_old_vms_get_no_seed(tmp_path: Path) -> None:
    """A VM that bash made has no vmInit: what its cloud-init would do to it now is not wanted."""
    vm = fake_clone(tmp_path)
    for kind, takes in {"cloud-init": True, "auto": True, "ssh": False, "systemd": False, "none": False}.items():
        vm.write_conf({"vmInit": kind})
        assert nocloud.takes_seed(vm) == takes
    conf = Path(vm.conf_file)
    conf.write_text(conf.read_text().replace("vmInit=none\n", ""))
    assert not nocloud.takes_seed(nocloud.VM(vm.tree, vm.group, vm.type, vm.name))


# What the user adds ##################################################################################

SCRIPT = b"#!/bin/sh\necho \xff\n"


def parts(data: bytes) -> list[Message]:
    """The leaves of a MIME message, as an independent reader finds them, in the order that cloud-init walks them."""
    message = email.message_from_bytes(data)
    assert message.get_content_type() == "multipart/mixed" and not message.defects
    return [part for part in message.walk() if not part.is_multipart()]


def merged(found: Sequence[Message]) -> dict[str, Any]:
    """Cloud-configs as cloud-init merges them: a later key replaces, unless Merge-Type has lists put together."""
    result: dict[str, Any] = {}
    for part in found:
        data = part.get_payload(decode=True)
        assert isinstance(data, bytes)
        if data.startswith(b"#cloud-config"):
            config = yaml.safe_load(data)
            if part["Merge-Type"]:
                assert part["Merge-Type"] == "list(append)+dict(no_replace,recurse_list)+str()"
                config = {key: [*result.get(key, []), *value] for key, value in config.items()}
            result.update(config)
    return result


def test_the_users_win_but_never_lock_us_out(tmp_path: Path) -> None:
    vm = fake_clone(tmp_path, user="debian")
    alone = cloud_config(nocloud.seed_files(vm, ["ssh-rsa OURS"]))
    theirs = {
        "hostname": "mine",
        "package_update": True,
        "packages": ["tmux"],
        "ssh_authorized_keys": ["ssh-rsa THEIRS"],
        "ssh_deletekeys": False,
        "ssh_keys": {"ed25519_private": "another"},
        "user": {"name": "bob"},
        "users": [{"name": "bob"}],
    }
    added = b"#cloud-config\n" + json.dumps(theirs).encode()
    result = merged(parts(nocloud.seed_files(vm, ["ssh-rsa OURS"], added)["user-data"]))
    won = ("hostname", "package_update", "packages", "users")
    assert result == {
        **alone,
        **{key: theirs[key] for key in won},
        "ssh_authorized_keys": ["ssh-rsa THEIRS", "ssh-rsa OURS"],
    }
    assert merged(parts(nocloud.seed_files(vm, ["ssh-rsa OURS"], SCRIPT)["user-data"])) == alone


@given(st.binary(max_size=300))
def test_additions_arrive_as_they_are(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    vm = fake_clone(tmp_path_factory.getbasetemp() / "added")
    added = b"#!" + data
    if not nocloud.is_mime(added):
        found = parts(nocloud.seed_files(vm, [], added)["user-data"])
        kinds = ["text/cloud-boothook", "text/cloud-config", "text/plain", "text/cloud-config", "text/cloud-config"]
        assert [part.get_content_type() for part in found] == kinds
        assert found[2].get_payload(decode=True) == added


def test_a_message_of_many_parts_keeps_them(tmp_path: Path) -> None:
    message = MIMEMultipart()
    message.attach(MIMEText("#cloud-config\nhostname: a\n", "cloud-config"))
    message.attach(MIMEText("#!/bin/sh\necho ä\n", "x-shellscript", "utf-8"))
    found = parts(nocloud.seed_files(fake_clone(tmp_path), ["ssh-rsa OURS"], message.as_bytes())["user-data"])
    kinds = ["cloud-boothook", "cloud-config", "cloud-config", "x-shellscript", "cloud-config", "cloud-config"]
    assert [part.get_content_type() for part in found] == [f"text/{kind}" for kind in kinds]
    assert merged(found)["hostname"] == "a" and merged(found)["ssh_authorized_keys"] == ["ssh-rsa OURS"]
    assert found[3].get_payload(decode=True) == "#!/bin/sh\necho ä\n".encode()


@pytest.mark.parametrize(
    "text",
    [
        "#!/bin/sh\n",
        "#cloud-config\n{}",
        "\n #Cloud-Config\n",
        "#include\nhttp://x",
        "## template: jinja\n#cloud-config",
    ],
)
def test_what_cloud_init_knows_is_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert nocloud.read_user_data(str(tmp_path / "file")) == text.encode()


@pytest.mark.parametrize(
    ("content", "word"), [(None, "No such file"), (b"", "begins"), (b"packages: [a]", "begins"), (b"#!" * MIB, "1 MB")]
)
def test_what_cloud_init_would_pass_over_is_told(tmp_path: Path, content: bytes | None, word: str) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(nocloud.UsageError) as caught:
        nocloud.read_user_data(str(path))
    assert word in f"{caught.value} {caught.value.hint}" and str(path) in str(caught.value)
    with pytest.raises(nocloud.UsageError, match="directory"):
        nocloud.read_user_data(str(tmp_path))


def broken_yaml_is_found() -> bool:
    """Whether this host can read YAML; elsewhere the guest's cloud-init tells."""
    words = ["/usr/bin/python3", "-I", "-c", "import yaml"]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not broken_yaml_is_found(), reason="no python3-yaml on this host")
@pytest.mark.parametrize("text", ["foo: [a\n", "a: b: c\n", "a: !thing b\n", "a: \xff\n", "\tb: c"])
def test_broken_yaml_is_told_before_the_first_vm(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"#cloud-config\n" + text.encode("latin-1"))
    with pytest.raises(nocloud.UsageError, match="not YAML") as caught:
        nocloud.read_user_data(str(path))
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["#cloud-config\n", "#cloud-config\n# a\na: [ä]\n", "#cloud-config-archive\n- a: [\n"])
def test_what_is_no_broken_yaml_is_taken(tmp_path: Path, text: str) -> None:
    """Another kind of user-data isn't read as YAML; nor is anything where no Python can."""
    (tmp_path / "file").write_text(text)
    assert nocloud.read_user_data(str(tmp_path / "file")) == text.encode()


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"])
def test_gzip_and_a_byte_order_mark_are_no_hindrance(tmp_path: Path, before: bytes) -> None:
    path = tmp_path / "file"
    for data in (before + SCRIPT, gzip.compress(before + SCRIPT)):
        path.write_bytes(data)
        assert nocloud.read_user_data(str(path)) == SCRIPT
    whole = gzip.compress(SCRIPT)
    broken = ((gzip.compress(b"#!" * MIB), "1 MB"), (whole[:-9], "ended"), (whole[:-8] + bytes(8), "CRC"))
    for data, word in (*broken, (whole[:10] + b"\xff" * 40, "invalid")):
        path.write_bytes(data)
        with pytest.raises(nocloud.UsageError, match=word):
            nocloud.read_user_data(str(path))


def test_a_pipe_that_nobody_writes_to_is_no_user_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(nocloud.UsageError, match="a pipe, and no file"):
        nocloud.read_user_data(str(tmp_path / "pipe"))


def test_additions_and_disks_are_checked_first(blank: Cloud) -> None:
    """Each error names its line; nothing is made."""
    image = blank.base / "templates/blank/blank_0.img"
    add_template(blank, image, "seeded", "--mem", 32, "--init", "cloud-init")
    blank.execute(["qemu-img", "create", "-q", "-f", "qcow2", blank.home / "large", "3G"]).ok()
    add_template(blank, blank.home / "large", "large", "--mem", 32, "--init", "none")
    (blank.home / "known").write_text("#!/bin/sh\n")
    (blank.home / "unknown").write_text("echo\n")
    lines = {
        "blank:1::user-data=known": ["takes no seed"],
        "seeded:1::user-data=unknown": ["user-data=", "#cloud-config"],
        "seeded:1::user-data=nowhere": ["nowhere", "No such file"],
        "large:1::disk=2": ["disk=2", "3 GB"],
        "blank:1::disk=1G": ["disk=1G", "GB"],
        "blank:1::disks=1": ["did you mean"],
    }
    file = blank.home / "group"
    with nothing_made(blank):
        for line, words in lines.items():
            file.write_text(f"# one\n{line}\n")
            # Names are of files beside the description, wherever it is read from.
            blank.run("vminstantiate", "-f", file, cwd=blank.base).fails(2, f"{file}:2", *words)
        default = blank.home / "config/nocloud/user-data"
        default.parent.mkdir(parents=True, exist_ok=True)
        default.write_text("nothing known\n")
        blank.run("vminstantiate", "-n", "seeded", "-g", "x").fails(2, str(default), "#cloud-config")
        default.write_text("#!/bin/sh\n")
        default.chmod(0o666)
        blank.run("vminstantiate", "-n", "seeded", "-g", "x").fails(2, str(default), "others may write")


def test_additions_are_kept_with_the_clone(blank: Cloud) -> None:
    """The default ones, or those of the line; a later start needs neither file. The disk is as large as asked for."""
    add_template(blank, blank.base / "templates/blank/blank_0.img", "seeded", "--mem", 32, "--init", "cloud-init")
    default = blank.home / "config/nocloud/user-data"
    default.parent.mkdir(parents=True, exist_ok=True)
    default.write_text("#!/bin/sh\necho default\n")
    (blank.home / "own").write_text("#!/bin/sh\necho own\n")
    (blank.home / "group").write_text("seeded:1::name=d\nseeded:1::name=o;user-data=own;disk=2;dsk=1\n")
    blank.run("vminstantiate", "-f", blank.home / "group").ok()
    for path in (default, blank.home / "own"):
        path.unlink()
    blank.run("vmstop", "-g", "group", "--kill").quiet()
    blank.start("d00", "o00").ok()
    for name, text in (("d00", b"default"), ("o00", b"own")):
        folder = blank.folder(f"group/default/{name}")
        assert modes(folder)["user-data"] == 0o600
        assert text in (parts((folder / "seed/user-data").read_bytes())[2].get_payload(decode=True) or b"")
    for disk, size in (("d00_0", 8 << 20), ("o00_0", 2 << 30), ("o00_1", 1 << 30)):
        image = blank.folder(f"group/default/{disk[:3]}") / f"{disk}.img"
        info = json.loads(blank.execute(["qemu-img", "info", "-U", "--output=json", image]).ok().stdout)
        assert info["virtual-size"] == size


# How it is attached ##################################################################################


def without_vvfat(cloud: Cloud) -> None:
    """A qemu as RHEL builds it."""
    path = cloud.home / "qemu"
    path.write_text(
        '#!/bin/sh\n[ "$*" = "-drive format=help" ] && { echo "Supported formats: file qcow2 raw"; exit; }\n'
        'exec qemu-system-x86_64 "$@"\n'
    )
    path.chmod(0o755)
    cloud.env["NOCLOUD_vmQemu"] = str(path)


def test_this_qemu_has_vvfat(cloud: Cloud, vms: None) -> None:
    code = "print(nocloud.choose_seed(nocloud.probe_qemu(nocloud.load_config(), 'x86_64')))"
    assert cloud.script(code).ok().stdout == "vvfat\n"
    without_vvfat(cloud)
    assert cloud.script(code).ok().stdout == "iso\n"


def test_neither_vvfat_nor_an_iso_writer(cloud: Cloud, tiny_image: Path, vms: None) -> None:
    """The package is named, before anything is made."""
    add_template(cloud, tiny_image, "tiny", "--init", "cloud-init")
    without_vvfat(cloud)
    cloud.env["PATH"] = link_programs(cloud.home / "bin", "xorriso", "genisoimage", "mkisofs")
    with nothing_made(cloud):
        cloud.run("vminstantiate", "-n", "tiny", "-g", "x").fails(127, "vvfat", "xorriso")
        cloud.run("vminstantiate", "-n", "tiny", "-g", "x", "--dry-run").fails(127, "vvfat", "xorriso")


# When it is done #####################################################################################

DONE, FAILED = '{"v1":{"errors":[]}}', '{"v1":{"errors":["no"]}}'


@pytest.mark.parametrize(
    ("result", "said", "code", "status"),
    [
        (DONE, "must not be asked", 1, 0),
        (FAILED, "status: error", 1, 1),
        (FAILED, "status: done", 0, 2),  # an old one, that doesn't count what went wrong
        (FAILED, "status: degraded done", 2, 2),
        (DONE + " degraded", "status: degraded done", 2, 2),  # warnings, since 23.4
        (DONE + " WARNING", "must not be asked", 1, 2),  # before that, only its log tells
        (DONE + " DEPRECATED", "must not be asked", 1, 0),
        ("", "status: running", 0, nocloud.NOT_YET),
        ("", "status: not started", 0, nocloud.NOT_YET),
        ("", "status: not run", 0, nocloud.NOT_YET),
        ("", "status: error", 1, 1),  # it crashed before it wrote a result
        ("disabled", "must not be asked", 1, 0),
        ("none", "", 1, 0),  # no cloud-init at all
    ],
)
def test_what_the_guest_is_asked(tmp_path: Path, result: str, said: str, code: int, status: int) -> None:
    """The script as a guest's shell runs it, with a cloud-init that says what is to be understood."""
    state, programs = tmp_path / "run", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    for name in ("sh", "grep", "cat", "awk", "id", "env"):
        (programs / name).symlink_to(shutil.which(name) or name)
    (programs / "sleep").symlink_to(shutil.which("true") or "true")
    if result == "disabled":
        (state / "disabled").touch()
    elif result:
        (state / "result.json").write_text(result.partition(" ")[0])
    if result.endswith("degraded"):
        (state / "status.json").write_text('{"v1": {"init": {"recoverable_errors": {"WARNING": ["a"]}}}}')
    if result != "none":
        (programs / "cloud-init").write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
        (programs / "cloud-init").chmod(0o755)
    text = "2026-11-26 01:26:24,516 - util.py[{}]: its words\n".format(result.rpartition(" ")[2])
    (tmp_path / "cloud-init-output.log").write_text(text)
    for seconds in (0, 1):
        script = nocloud.guest_script("cloud-init.sh", PATIENCE=seconds, NOT_YET=nocloud.NOT_YET)
        script = script.replace("/run/cloud-init", str(state)).replace("/var/log", str(tmp_path))
        script = script.replace("sudo -n", "env")
        words = [str(programs / "sh"), "-c", script]
        done = subprocess.run(words, env={"PATH": str(programs)}, capture_output=True, text=True, check=False)
        early = seconds == 0 and not result  # not even asked
        assert done.returncode == (nocloud.NOT_YET if early else status), done
        assert bool(done.stdout) == (done.returncode in (1, 2)), done
        assert ("its words" in done.stdout) == result.endswith("WARNING")


# What cloud-init 22.4 wrote in a Debian 12: an earlier boot, then a boot with a broken part and a failing runcmd.
LOG = """\
Cloud-init v. 22.4.2 running 'init-local' at Thu, 26 Nov 2026 01:06:16 +0000. Up 98.07 seconds.
2026-11-26 01:06:34,731 - util.py[WARNING]: Of an earlier boot
Cloud-init v. 22.4.2 running 'init-local' at Thu, 26 Nov 2026 01:26:16 +0000. Up 98.07 seconds.
2026-11-26 01:26:23,740 - util.py[WARNING]: Failed loading yaml blob. Invalid format at line 2 column 6: "while parsing
  in "<unicode string>", line 2, column 6:
    foo: [a
         ^
expected ',' or ']', but got '<stream end>'
    ^"
2026-11-26 01:26:24,516 - util.py[WARNING]: Failed loading yaml blob. Invalid format at line 2 column 6: "while parsing
2026-11-26 01:26:24,517 - util.py[WARNING]: DEPRECATED: this and that
2026-11-26 01:26:24,518 - util.py[WARNING]: failed stage init-local
Traceback (most recent call last):
  File "/usr/lib/python3/dist-packages/cloudinit/cmd/main.py", line 766, in status_wrapper
Exception: Failed to establish a new connection for url: http://127.0.0.1:9/x
Cloud-init v. 22.4.2 running 'init' at Thu, 26 Nov 2026 01:26:57 +0000. Up 140.05 seconds.
ci-info: +-------+-------------+---------+-----------+-------+
Cloud-init v. 22.4.2 running 'modules:final' at Thu, 26 Nov 2026 01:28:03 +0000. Up 205.49 seconds.
starting
/var/lib/cloud/instance/scripts/runcmd: 3: nosuchcmd: not found
cat: /nonexistent/cause: No such file or directory
2026-11-26 01:28:09,142 - cc_scripts_user.py[WARNING]: Failed to run module scripts-user (scripts in /var/lib)
2026-11-26 01:28:09,193 - util.py[WARNING]: Running module scripts-user failed
Cloud-init v. 22.4.2 finished at Thu, 26 Nov 2026 01:28:15 +0000. Datasource DataSourceNoCloud.  Up 217.62 seconds
"""
CAUSES = """\
util.py[WARNING]: Failed loading yaml blob. Invalid format at line 2 column 6: "while parsing
expected ',' or ']', but got '<stream end>'
util.py[WARNING]: failed stage init-local
Exception: Failed to establish a new connection for url: http://127.0.0.1:9/x
starting
/var/lib/cloud/instance/scripts/runcmd: 3: nosuchcmd: not found
cat: /nonexistent/cause: No such file or directory
cc_scripts_user.py[WARNING]: Failed to run module scripts-user (scripts in /var/lib)
util.py[WARNING]: Running module scripts-user failed
"""


def test_the_cause_is_told_and_not_only_that_it_failed(tmp_path: Path) -> None:
    for name, text in {"result.json": FAILED, "cloud-init-output.log": LOG}.items():
        (tmp_path / name).write_text(text)
    for name, text in {"cloud-init": "echo status: error; exit 1", "sudo": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = nocloud.guest_script("cloud-init.sh", PATIENCE=0, NOT_YET=nocloud.NOT_YET)
    script = script.replace("/run/cloud-init", str(tmp_path)).replace("/var/log", str(tmp_path))
    script = script.replace("sudo -n", "env")
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["sh", "-c", script], env={"PATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, CAUSES, "")


# nocloud's own way in ################################################################################

INCLUDE = "# sshd_config(5)\nInclude /etc/ssh/sshd_config.d/*.conf\nPermitRootLogin no\n"
MATCH = "Port 22\nMatch User bob\n  AuthorizedKeysFile none\n"


@pytest.mark.parametrize("config", [INCLUDE, MATCH, None])
def test_the_boothook_has_sshd_read_our_keys_first(tmp_path: Path, config: str | None) -> None:
    """As often as it runs, where sshd_config includes others' files and where it doesn't, or lies elsewhere."""
    folder = tmp_path / "ssh"
    folder.mkdir()
    if config:
        (folder / "sshd_config").write_text(config)
    hook = parts(nocloud.seed_files(fake_clone(tmp_path / "vms"), ["ssh-rsa A it's", "ssh-rsa B"])["user-data"])[0]
    script = str(hook.get_payload()).replace("/etc/ssh", str(folder)).replace("/run/sshd.pid", f"{tmp_path}/pid")
    assert script.startswith("#!/bin/sh\n")
    (tmp_path / "hook").write_text(script)
    (tmp_path / "hook").chmod(0o755)
    sshd = subprocess.Popen(["sleep", "60"])
    try:
        for _ in range(2):
            subprocess.run([tmp_path / "hook"], check=True)
        (tmp_path / "pid").write_text(str(sshd.pid))
        subprocess.run([tmp_path / "hook"], check=True)
        assert sshd.wait(10) == -1  # SIGHUP, by which sshd reads its configuration again
    finally:
        sshd.kill()
        sshd.wait()
    assert (folder / "nocloud_keys").read_text() == "ssh-rsa A it's\nssh-rsa B\n"
    assert stat.S_IMODE((folder / "nocloud_keys").stat().st_mode) == 0o644  # sshd reads it as the one who logs in
    line = nocloud.LOGIN_LINE.replace("/etc/ssh", str(folder)) + "\n"
    assert (folder / "sshd_config.d/00-nocloud.conf").read_text() == line
    if config:
        assert (folder / "sshd_config").read_text() == (config if config == INCLUDE else line + config)
    assert sorted(path.name for path in folder.iterdir() if path.name != "sshd_config") == [
        "nocloud_keys",
        "sshd_config.d",
    ]


def test_no_password_is_asked_for_where_our_key_was_planted(cloud: Cloud) -> None:
    """Elsewhere one may be the only way in."""
    said = cloud.script("print(nocloud.ssh_key_options(True)); print(nocloud.ssh_key_options(False))").ok().lines
    assert ["PreferredAuthentications=publickey" in words for words in said] == [True, False]


# Guests ##############################################################################################


@pytest.fixture(scope="module")
def seeded(shared: Cloud, tiny_image: Path) -> Iterator[Cloud]:
    """A cloud with the template `seeded`, and two clones of it."""
    add_template(shared, tiny_image, "seeded", "--mem", 96, "--cpu", 1, "--init", "cloud-init")
    options = ("-C", 2, "-g", "ci", "-o", "name=s;dsk=1", "-w", READY)
    done = shared.run("vminstantiate", "--debug", "-n", "seeded", *options).ok()
    (shared.home / "debug").write_text(done.stderr)
    yield shared


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_each_clone_is_who_its_seed_says(seeded: Cloud) -> None:
    """Name, keys, and the host key from the first contact on; the seed is after the data disk."""
    known = (seeded.base / ".known_hosts").read_text()
    assert known.count("\n") == 2
    for name in ("s00", "s01"):
        folder = seeded.folder(f"ci/default/{name}")
        conf = seeded.conf(f"ci/default/{name}")
        public = (folder / "ssh_host_ed25519_key.pub").read_text().split()[1]
        assert f"{conf['vmUuid']},{conf['vmAddress']} ssh-ed25519 {public}\n" in known
        script = (
            "hostname; cat /etc/instance-id /root/.ssh/authorized_keys; findfs LABEL=CIDATA; cat /sys/block/vd?/serial"
        )
        said = seeded.ssh(name, script).ok().stdout
        assert said.startswith(f"{name}\nseed {conf['vmUuid']}\n")
        assert (seeded.home / "config/nocloud/id_ed25519.pub").read_text() in said
        assert "\n/dev/vdc1\n" in said and said.endswith(f"{name}_0{name}_1seed")
        assert (folder / "configured").exists()


def test_the_key_is_nowhere_but_in_the_seed(seeded: Cloud) -> None:
    folder = seeded.folder("ci/default/s00")
    assert modes(folder / "seed") == {"user-data": 0o600, "meta-data": 0o600, "network-config": 0o600}
    assert modes(folder)["seed"] == 0o700
    texts = {str(pid): " ".join(proc_words(pid, "cmdline")) for pid in pids()}
    texts |= {name: (folder / name).read_text(errors="replace") for name in ("s00.command", "s00.conf", "s00.log")}
    texts["--debug"] = (seeded.home / "debug").read_text()
    found = secrets(seeded)
    assert found[2] in (folder / "seed/user-data").read_text()
    assert not [place for place, text in texts.items() for secret in found if secret in text]
    assert "dir=seed," in texts["s00.command"]


@pytest.mark.long
def test_started_again_it_is_the_same(seeded: Cloud) -> None:
    """The same instance: cloud-init does nothing a second time, here after a start by hand."""
    look = "cat /etc/ssh/ssh_host_ed25519_key; wc -l < /root/.ssh/authorized_keys; cat /root/file"
    before = seeded.ssh("s00", f"echo kept > /root/file; {look}").ok().stdout
    seeded.run("vmstop", "-n", "s00").quiet()
    argv = [seeded.folder("ci/default/s00") / "s00.command"]
    child = subprocess.Popen(argv, env=seeded.env, cwd=seeded.home, stdin=subprocess.DEVNULL)
    try:
        eventually(lambda: "s00 " in seeded.run("vmrunning").stdout or child.poll() is not None, "s00 runs")
        assert seeded.ssh("s00", look).ok().stdout == before
        seeded.run("vmstop", "-d", "-g", "ci").quiet()
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.wait()


def wait_for_it(cloud: Cloud, name: str, seconds: int) -> Result:
    """What -w does, for a VM that runs already."""
    return cloud.script(
        "with nocloud.Cloud(nocloud.load_config()) as cloud:\n"
        f"    errors = nocloud.wait_all(cloud, [cloud.tree.need({name!r})], {seconds})\n"
        "sys.exit(nocloud.report_errors(errors))"
    )


def test_ready_means_that_cloud_init_is_done(seeded: Cloud) -> None:
    """Late: it is waited for, and ssh answers meanwhile. Failed: its own words are shown. On a disk of another size."""
    (seeded.home / "late").write_text(
        "#cloud-config\nruncmd:\n - until [ -e /root/go ]; do sleep 0.2; done\n - touch /root/gone\n"
    )
    (seeded.home / "broken").write_text("#!/bin/sh\necho broken on purpose\nexit 3\n")
    lines = "seeded:1::name=late;user-data=late;disk=1\nseeded:1::name=broken;user-data=broken\n"
    (seeded.home / "two").write_text(lines)
    seeded.run("vminstantiate", "-f", seeded.home / "two").ok()
    assert seeded.ssh("late00", "cat /sys/block/vda/size").ok().stdout == f"{(1 << 30) // 512}\n"
    wait_for_it(seeded, "late00", 1).fails(124, "late00: not ready", "cloud-init")
    seeded.ssh("late00", "touch /root/go").ok()
    wait_for_it(seeded, "late00", int(READY)).quiet()
    assert "gone" in seeded.ssh("late00", "ls /root").ok().stdout
    wait_for_it(seeded, "broken00", int(READY)).fails(1, "broken00: cloud-init failed", "broken on purpose", "vmssh")
    seeded.ssh("broken00", "true").quiet()
    seeded.run("vmstop", "-d", "-g", "two").quiet()


def has_booted(folder: Path) -> bool:
    return "ready after" in (folder / "console.log").read_text(errors="replace")


@pytest.mark.long
def test_what_was_left_out_is_told_once(seeded: Cloud) -> None:
    """At the first contact, whichever that is, with the file and cloud-init's own line."""
    message = MIMEMultipart()
    message.attach(MIMEText("#!/bin/sh\n", "x-shellscript"))
    message.attach(MIMEText("what is this\n"))
    (seeded.home / "mime").write_bytes(message.as_bytes())
    (seeded.home / "half").write_text("seeded:2::name=half;user-data=mime\n")
    seeded.run("vminstantiate", "-f", seeded.home / "half").ok()
    for name in ("half00", "half01"):
        folder = seeded.folder(f"half/default/{name}")
        eventually(functools.partial(has_booted, folder), "it has booted", 60)
        said = wait_for_it(seeded, name, int(READY)) if name == "half00" else seeded.ssh(name, "true")
        assert without_waits(said.ok().stderr).count("\n") == 1 and "warning: half" in said.stderr, said
        for word in (f"{folder}/user-data", "[WARNING]: Unhandled part"):
            assert word in said.stderr and word in (folder / f"{name}.log").read_text()
        assert wait_for_it(seeded, name, int(READY)).quiet() and seeded.ssh(name, "true").quiet()


@pytest.mark.long
def test_a_login_that_is_denied_is_told_within_seconds(seeded: Cloud) -> None:
    """With what the console says; vmssh ends as ssh does."""
    seeded.run("vminstantiate", "-n", "seeded", "-g", "shut", "-o", "name=shut", "-w", READY).ok()
    seeded.ssh("shut00", "rm /root/.ssh/authorized_keys").ok()
    told = ("shut00: the key that was planted lets nobody in: root@", "Permission denied", "; its console says: [")
    done = wait_for_it(seeded, "shut00", 120).fails(1, *told)
    assert done.seconds < 60
    assert "Permission denied" in seeded.ssh("shut00", "true").stderr
    seeded.run("vmstop", "-d", "-g", "shut").quiet()


def init_of(cloud: Cloud, vm: str) -> str:
    return cloud.conf(vm)["vmInit"]


@pytest.fixture
def without_a_vvfat(seeded: Cloud) -> Iterator[Cloud]:
    """The same cloud, for a while with a qemu as RHEL has it."""
    before = dict(seeded.env)
    without_vvfat(seeded)
    yield seeded
    seeded.env = before


@pytest.mark.long
def test_auto_is_settled_at_the_first_contact(without_a_vvfat: Cloud, tiny_image: Path, guest_cache: Path) -> None:
    """A guest that took the seed, an ISO here, is held to the planted host key; one that didn't, to its own."""
    cloud = without_a_vvfat
    add_template(cloud, tiny_image, "with", "--mem", 96, "--cpu", 1)
    add_template(cloud, keyed_image(cloud, guest_cache), "without", "--mem", 96, "--cpu", 1)
    assert init_of(cloud, "templates/with") == init_of(cloud, "templates/without") == "auto"
    (cloud.home / "script").write_text("#!/bin/sh\n")
    (cloud.home / "auto").write_text("with:1::name=a\nwithout:1::name=b;user-data=script\n")
    cloud.run("vminstantiate", "-f", cloud.home / "auto").ok()
    for name, kind in {"a00": "cloud-init", "b00": "ssh"}.items():
        folder, conf = cloud.folder(f"auto/default/{name}"), f"auto/default/{name}"
        assert modes(folder / "seed")["seed.iso"] == 0o600
        assert re.search(r"driver=raw,node-name=seed,.*=seed/seed.iso", (folder / f"{name}.command").read_text())
        assert cloud.ssh(name, "hostname").ok().stdout == f"{name}\n"
        eventually((folder / "configured").exists, "it has been configured, by vmssh or the helper", 60)
        assert init_of(cloud, conf) == kind
        (line,) = [line for line in known_hosts(cloud) if cloud.conf(conf)["vmUuid"] in line]
        planted = (folder / "ssh_host_ed25519_key.pub").read_text().split()[1]
        assert (planted in line) == (kind == "cloud-init")
    assert cloud.ssh("a00", "findfs LABEL=cidata").ok().stdout == "/dev/vdb\n"
    assert "no cloud-init" in (cloud.folder("auto/default/b00") / "b00.log").read_text()
    assert "no cloud-init" not in (cloud.folder("auto/default/a00") / "a00.log").read_text()
    # As if it had been killed after the key was pinned: the pinned key tells.
    conf_file = cloud.folder("auto/default/a00") / "a00.conf"
    conf_file.write_text(conf_file.read_text().replace("vmInit=cloud-init", "vmInit=auto"))
    before = known_hosts(cloud)
    assert cloud.ssh("a00", "hostname").ok().stdout == "a00\n"
    assert init_of(cloud, "auto/default/a00") == "cloud-init" and known_hosts(cloud) == before
    cloud.run("vmstop", "-d", "-g", "auto").quiet()


def known_hosts(cloud: Cloud) -> list[str]:
    return sorted((cloud.base / ".known_hosts").read_text().splitlines())
