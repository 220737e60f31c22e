"""Configuration files, which were bash once: parsed, never executed; and the other file a user writes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PROGRAM, ROOT, Cloud, Result, add_blank, bash_values

import nocloud

HOME = os.path.expanduser("~")


def parse(text: str, known: dict[str, str] | None = None) -> dict[str, str]:
    return {each.key: each.value for each in nocloud.parse_assignments(text, "FILE", known or {})}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("#!/bin/bash\n# a comment\n\n   # another\n", {}),
        ("a=1", {"a": "1"}),
        ("a=1\r\nb=2\r\n", {"a": "1", "b": "2"}),
        ("a=", {"a": ""}),
        ("a=''", {"a": ""}),
        ("  a=1  ", {"a": "1"}),
        ("export a=1", {"a": "1"}),
        ("export\ta=1 # why", {"a": "1"}),
        ("a=1 # a comment", {"a": "1"}),
        ("a=1#no_comment", {"a": "1#no_comment"}),
        ("a='1 # 2' # 3", {"a": "1 # 2"}),
        ('a="x y"', {"a": "x y"}),
        ("a='$x `y`'", {"a": "$x `y`"}),
        (r'a="\$x \`y\` \" \\ \z"', {"a": r'$x `y` " \ \z'}),
        (r"a=x\ y\$z", {"a": "x y$z"}),
        ("a='x'\"y\"z", {"a": "xyz"}),
        ("a=1\na=2", {"a": "2"}),
        ("a=1\nb=$a", {"a": "1", "b": "1"}),
        (
            "bridgeSubnet=10.1.2\nbridgeIpAddress=${bridgeSubnet}.1",
            {"bridgeSubnet": "10.1.2", "bridgeIpAddress": "10.1.2.1"},
        ),
        ('a=x\nb="${a}y$a"', {"a": "x", "b": "xyx"}),
        ("a=$nothing", {"a": ""}),
        ("a=x${nothing}y", {"a": "xy"}),
        ("a=${nothing:-word}", {"a": "word"}),
        ('a="${nothing:-two words}"', {"a": "two words"}),
        ("a=${OUTSIDE:-word}", {"a": "from outside"}),
        ("a=\nb=${a:-word}", {"a": "", "b": "word"}),
        ("a=~", {"a": HOME}),
        ("a=~/x", {"a": f"{HOME}/x"}),
        ("a='~/x'", {"a": "~/x"}),
        ('a="~/x"', {"a": "~/x"}),
        ("a=x~", {"a": "x~"}),
        ("a=ü", {"a": "ü"}),
        ("a=x=y", {"a": "x=y"}),
    ],
)
def test_what_is_read(text: str, values: dict[str, str], tmp_path: Path) -> None:
    """And bash reads the same."""
    assert parse(text, {"OUTSIDE": "from outside"}) == values
    file = tmp_path / "conf"
    file.write_text(text.replace("\r", ""))
    os.environ["OUTSIDE"] = "from outside"
    try:
        assert bash_values(file) == values
    finally:
        del os.environ["OUTSIDE"]


@pytest.mark.parametrize(
    "line",
    [
        "a=$(touch x)",
        'a="$(touch x)"',
        "a=`touch x`",
        'a="`touch x`"',
        "a=1; touch x",
        "a=1;touch x",
        "a=1 && touch x",
        "a=1 | touch x",
        "a=1 > x",
        "a=<(touch x)",
        "a=${x:=y}",
        "a=${x:-$(touch x)}",
        "a=${x:-`touch x`}",
        "a=${x//a/b}",
        "a=${x",
        "a=${!x}",
        "a=$((1+1))",
        "a=$",
        "a=$1",
        "a=$'x'",
        'a=$"x"',
        "a='x",
        'a="x',
        "a=x y",
        "a=x export b=1",
        "a=(1 2)",
        "a={1,2}",
        "a+=1",
        "a[0]=1",
        "1a=1",
        "a =1",
        "=1",
        "touch x",
        "if true; then",
        "fi",
        "source x",
        ". x",
        "unset a",
        "é=1",
        "a-b=1",
        "export",
        "export a",
        "a=1 &",
        "a=1\\",
    ],
)
def test_what_is_refused(line: str) -> None:
    with pytest.raises(nocloud.UsageError) as raised:
        parse(f"# first\nb=1\n{line}\n")
    assert str(raised.value).startswith("FILE:3: ")
    assert raised.value.status == 2


def test_a_line_in_the_middle_of_an_open_quote_is_an_error() -> None:
    """bash would go on to the next line; we say so instead of reading on."""
    with pytest.raises(nocloud.UsageError, match=r"^FILE:1: "):
        parse("a='x\ny'")


ONE_LINE = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
)


@given(ONE_LINE)
def test_quoted_values_come_back(value: str) -> None:
    assert parse(f"key={nocloud.quote_value(value)}") == {"key": value}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0")))
def test_quoted_values_of_any_line_come_back(value: str) -> None:
    """Also with the characters that only str.splitlines takes for an end of line."""
    assert parse(f"key={nocloud.quote_value(value)}") == {"key": value}


@settings(max_examples=25)
@given(st.lists(ONE_LINE, max_size=8))
def test_bash_reads_what_we_write(values: list[str]) -> None:
    lines = [f"printf '%s\\0' \"$key{number}\"" for number in range(len(values))]
    text = nocloud.update_assignments("", {f"key{number}": value for number, value in enumerate(values)})
    done = subprocess.run(["bash"], input=(text + "\n".join(lines)).encode(), capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == values
    assert done.stderr == b""


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except nocloud.UsageError as error:
        assert str(error).startswith("FILE:") and "\n" not in nocloud.printable(str(error))


@given(st.text("ab=$ {}'\"\\:-~`#;", max_size=30))
def test_any_line_is_read_as_bash_reads_it_or_refused(value: str) -> None:
    """Where the line is accepted and holds no variable, it runs nothing: what is read has no expansion left to do."""
    try:
        read = parse(f"key={value}")
    except nocloud.UsageError:
        return
    again = parse(nocloud.update_assignments(f"key={value}\n", read))
    assert again == read


KEYS = st.sampled_from(["vmMem", "vmCpu", "vmUuid", "other", "x_1"])


@given(st.lists(st.tuples(KEYS, ONE_LINE)), st.dictionaries(KEYS, ONE_LINE))
def test_update_changes_what_it_is_told_and_nothing_else(
    before: list[tuple[str, str]], changes: dict[str, str]
) -> None:
    text = "#!/bin/bash\n# kept\n" + "".join(f"{key}={nocloud.quote_value(value)} # why\n" for key, value in before)
    after = nocloud.update_assignments(text, changes)
    assert parse(after) == {**dict(before), **changes}
    assert after.startswith("#!/bin/bash\n# kept\n")
    kept = [line for line in text.splitlines() if line.split("=")[0] not in changes]
    assert [line for line in after.splitlines() if line in kept] == kept


def test_a_value_is_one_line() -> None:
    for value in ("a\nb", "a\rb", "a\0b"):
        with pytest.raises(nocloud.UsageError):
            nocloud.quote_value(value)


# Values ##############################################################################################


# key, what it may be, what not; typed by hand.
CHECKS: list[tuple[str, list[str], list[str]]] = [
    ("vmMem", ["16", "512", "65536"], ["", "0", "-1", "1G", "512M", " 512", "٣", "1e3", "99999999999"]),
    ("vmCpu", ["1", "64"], ["0", "-1", "1.5", "two"]),
    ("vmCreateDiskSize", ["1", "1000"], ["", "0", "-1", "10G"]),
    ("vmCount", ["1", "1000"], ["0", "-1", "abc", "1001"]),
    ("vmDiskExt", ["img", "qcow2"], ["", "raw", ".img"]),
    ("vmAccel", ["auto", "kvm", "tcg"], ["", "KVM", "xen"]),
    ("vmNetwork", ["auto", "bridge", "private"], ["nat", ""]),
    ("vmHostAccess", ["", "yes", "no", "on", "0"], ["host", "y"]),
    ("vmArch", ["x86_64", "aarch64"], ["", "arm64", "amd64"]),
    ("vmInit", ["auto", "systemd", "cloud-init", "ssh", "none"], ["x"]),
    ("vmUser", ["root", "_a-b1"], ["", "-oProxyCommand=x", "a b", "Root", "a" * 33, "a,b"]),
    (
        "vmMac",
        ["", "00:50:56:ab:cd:ef"],
        ["00:50:56", "00:50:56:ab:cd:eg", "00:50:56:ab:cd:ef,id=x", "01:00:5e:00:00:01", "00:00:00:00:00:00"],
    ),
    ("vmAddress", ["", "10.88.0.2"], ["10.88.0", "10.88.0.02", "256.1.1.1", "::1", "x"]),
    ("vmUuid", ["", "6ba7b810-9dad-41d1-80b4-00c04fd430c8"], ["6ba7b810", "x"]),
    ("vmStopTimeout", ["0", "30"], ["-1", "1.5", "never"]),
    ("vmWaitTimeout", ["0", "300"], ["-1", "", "86401"]),
    ("vmDownloadTimeout", ["1", "3600"], ["0", "3601", "1.5", ""]),
    ("vmInventoryHosts", ["address", "name"], ["", "names"]),
    ("vmMachine", ["", "pc", "pc-q35-7.2"], ["pc,accel=kvm", "-x", "a b"]),
    ("vmCpuCap", ["0", "100"], ["101", "-1", "half"]),
    ("vmDiskFormat", ["qcow2", "qcow2,raw"], ["vmdk", "qcow2,", "qcow2 raw"]),
    (
        "vmShares",
        ["", "/a:/b", "/a b/c:/src/.x:rw,/:/...a", ",".join(["/a:/b"] * 8)],
        [
            *("/a", "/a:", ":/b", "a:/b", "/a:b", "/a:/", "/a:/b/", "/a:/..", "/a:/b/../c", "/a:/./b", "/a:/b:ro"),
            *("/a:/b:rw:", "/a:/b,", "/a:/b c", "/a:/b;c", "/a:/b\n", "/a\n:/b", "/a:/ä", ",".join(["/a:/b"] * 9)),
        ],
    ),
    (
        "vmPorts",
        ["", "8080:80", "0:80", "0.0.0.0:8080:80,127.0.0.2:65535:65535"],
        [
            "80",
            "8080:0",
            "65536:1",
            "1:65536",
            "8080:80/udp",
            "x:8080:80",
            "8080:80,",
            "8080:80 ",
            "::1:8080:80",
            "0:8080:80",
            "127.1:8080:80",
            "0127.0.0.1:8080:80",
            "256.0.0.1:8080:80",
            "224.0.0.1:8080:80",
        ],
    ),
    ("vmCold", ["", "0", "yes", "no"], ["2", "warm"]),
    ("vmBalloon", ["", "0", "yes", "no"], ["2", "full"]),
    ("vmFirmware", ["bios", "uefi", "secure"], ["", "UEFI", "efi", "no"]),
    ("vmTpm", ["", "0", "yes", "no"], ["2", "tis"]),
    ("vmLayout", ["1", "2"], ["0", "3", "x"]),
    ("vmPlugged", ["0", "4"], ["-1", "5", "x"]),
    ("vmGui", ["", "0", "1", "yes", "no", "true", "False", "on", "OFF"], ["2", "y", "screen"]),
    ("bridgeInterface", ["nocloud", "br0"], ["br0,x", "-x"]),
    ("bridgeAddress", ["10.0.0.1/8", "192.168.1.1/30"], ["", "10.0.0.1", "10.0.0.1/7", "10.0.0.1/31", "x/24"]),
    ("bridgeNet", ["10.0.0.0/8"], ["", "10.0.0.0", "10.0.0/24", "10.0.0.0/08"]),
    *(
        (key, ["192.168.1.2"], ["192.168.1", "192.168.1.256", "192.168.1.2/24"])
        for key in ("bridgeIpAddress", "bridgeDhcpStart", "bridgeDhcpStop")
    ),
]
# Any line will do.
FREE_TEXT = [
    "vmBaseDir", "vmGroup", "vmSubGroup", "vmDefaultGroup", "vmDefaultSubGroup", "vmCreateGroup", "isoDir",
    "vmExtraOpts", "vmQemu", "vmBridgeHelper", "vmVirtiofsd", "bridgeSubnet", "bridgeLeases", "vmName", "vmDisk",
    "vmExtraDisk", "vmTemplate", "vmKernel", "vmInitrd", "vmAppend", "vmSource", "vmChecksum",
]  # fmt: skip


@pytest.mark.parametrize("key", [setting.key for setting in nocloud.SETTINGS if setting.where != "unused"])
def test_every_setting_has_a_row(key: str) -> None:
    rows = [row[0] for row in CHECKS] + FREE_TEXT
    assert rows.count(key) == 1, f"{key}: type what it may be, and what not, into CHECKS of tests/test_settings.py"


@pytest.mark.parametrize("key", [setting.key for setting in nocloud.SETTINGS if setting.where != "unused"])
def test_every_setting_is_read_by_something(key: str) -> None:
    assert PROGRAM.read_text().count(f'"{key}"') > 1, f"{key}: it is declared, and nothing in nocloud.py asks for it"


@pytest.mark.parametrize(("key", "good", "bad"), CHECKS)
def test_values_are_checked(key: str, good: list[str], bad: list[str]) -> None:
    for value in good:
        nocloud.check_setting(key, value, "FILE:1")
    for value in bad:
        if value or nocloud.SETTING[key].default:
            with pytest.raises(nocloud.UsageError, match=rf"^FILE:1: {key}="):
                nocloud.check_setting(key, value, "FILE:1")


@pytest.mark.parametrize("key", FREE_TEXT)
def test_values_that_are_free(key: str) -> None:
    for value in ("", "x", "a b, c=d", "ü"):
        nocloud.check_setting(key, value, "FILE:1")


def test_every_setting_of_the_contract_is_there_with_its_default() -> None:
    defaults = {
        "vmMem": "512",
        "vmCpu": "2",
        "vmCreateDiskSize": "10",
        "vmCount": "1",
        "vmGroup": "group",
        "vmSubGroup": "default",
        "vmCreateGroup": "templates",
        "isoDir": "~/Documents/distribs/linux",
        "vmDiskExt": "img",
        "vmUser": "root",
        "vmAccel": "auto",
        "vmNetwork": "auto",
        "vmHostAccess": "no",
        "vmStopTimeout": "30",
        "vmWaitTimeout": "300",
        "vmExtraOpts": "",
        "vmQemu": "",
        "vmBridgeHelper": "",
        "bridgeInterface": "nocloud",
        "bridgeAddress": "192.168.1.1/24",
        "bridgeNet": "192.168.1.0/24",
        "bridgeDhcpStart": "192.168.1.2",
        "bridgeDhcpStop": "192.168.1.254",
    }
    config = nocloud.Config()
    assert {key: config[key] for key in defaults} == defaults
    unused = (
        "netInterface vmMemVid vmSpicePassword vmBackend vmSystemType vmConfExt vmPidExt vmDefaultContext vmDefaultType"
        " vmCreateContext vmCreateType"
    )
    for key in unused.split():
        assert nocloud.SETTING[key].where == "unused"
    in_vms = "vmName vmMem vmCpu vmDisk vmExtraDisk vmUuid vmMac vmAddress vmNetwork vmTemplate vmInit vmUser"
    for key in f"{in_vms} vmMachine vmAccel vmGui vmKernel vmInitrd vmAppend vmCpuCap".split():
        assert nocloud.SETTING[key].where in ("vm", "both"), key


# Files and the environment, as a command reads them ##################################################


def memory_in_force(cloud: Cloud, **env: str) -> str:
    """The default that -h shows."""
    import re

    done = cloud.run("vmtemplate", "-h", env=env)
    assert (done.status, done.stderr) == (0, ""), repr(done)
    match = re.search(r"--mem MB[^[]*\[(\d+)\]", done.stdout)
    assert match
    return match.group(1)


def test_the_first_own_file_counts_and_the_environment_overrides(cloud: Cloud) -> None:
    files = [
        cloud.home / ".nocloud.conf",
        cloud.home / "config/nocloud/nocloud.conf",
        Path("/etc/nocloud.conf"),
    ]
    files[1].parent.mkdir(parents=True)
    files[1].write_text("vmMem=1001\n")
    here = cloud.home / "here"
    here.mkdir()
    (here / ".nocloud.conf").write_text("vmMem=1003\n")
    assert memory_in_force(cloud) == "512"  # ~/.nocloud.conf is there, and empty
    files[0].write_text("vmMem=1002\nvmCpu=3\n")
    assert memory_in_force(cloud) == "1002"
    done = cloud.run("vmtemplate", "-h", cwd=here).ok()
    assert "[1003]" in done.stdout and "[3]" in done.stdout  # ./ comes on top of it
    files[0].unlink()
    assert memory_in_force(cloud) == "1001"
    assert memory_in_force(cloud, NOCLOUD_vmMem="77") == "77"
    assert memory_in_force(cloud, NOCLOUD_VMMEM="78") == "78"
    if not files[2].exists():
        files[1].unlink()
        assert memory_in_force(cloud) == "512"


def test_the_installations_own_file_comes_first(cloud: Cloud) -> None:
    import shutil

    prefix = cloud.home / "prefix"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "etc").mkdir()
    shutil.copy(PROGRAM, prefix / "bin/nocloud.py")
    (prefix / "etc/nocloud_net.conf").write_text("vmMem=900\nvmGroup=ours\n")
    (cloud.home / ".nocloud.conf").write_text("vmMem=901\n")
    link = cloud.home / "vminstantiate"
    link.symlink_to(prefix / "bin/nocloud.py")  # PREFIX is found through the link
    shown = cloud.execute([sys.executable, "-IS", link, "-h"]).ok().stdout
    assert "[ours]" in shown
    shown = cloud.execute([sys.executable, "-IS", prefix / "bin/nocloud.py", "template", "-h"]).ok().stdout
    assert "[901]" in shown


def test_old_names_of_settings(cloud: Cloud) -> None:
    (cloud.home / ".nocloud.conf").write_text(
        "vmDefaultGroup=old\nvmDefaultSubGroup=kind\nvmSpicePassword=x\nvmBackend=y\n"
    )
    done = cloud.run("vminstantiate", "-h").ok()
    assert "[old]" in done.stdout and "[kind]" in done.stdout and done.stderr == ""


def test_unknown_key_is_a_warning_with_the_nearest(cloud: Cloud) -> None:
    file = cloud.home / ".nocloud.conf"
    file.write_text("vmMen=64\nprefix=10.0.0\nbridgeSubnet=$prefix\nzzz=1\n")
    done = cloud.run("vmrunning").ok()
    lines = done.stderr.splitlines()
    assert len(lines) == 2  # prefix is used by a later line
    assert f"{file.name}:1: " in lines[0] and "vmMen" in lines[0] and "vmMem?" in lines[0]
    assert f"{file.name}:4: " in lines[1] and "zzz" in lines[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vmMem=1G", "MB"),
        ("vmMem=$(touch x)", "$"),
        ("vmMem=`touch x`", "`"),
        ("vmMem=64; touch x", ";"),
        ("touch x", "touch x"),
        ("vmNetwork=nat", "private"),
    ],
)
def test_a_wrong_line_is_an_error_with_its_place(cloud: Cloud, line: str, said: str) -> None:
    file = cloud.home / ".nocloud.conf"
    file.write_text(f"# mine\n{line}\n")
    cloud.run("vmrunning").fails(2, f"{file.name}:2: ", said)
    assert not (cloud.home / "x").exists()


def test_a_wrong_variable_is_an_error(cloud: Cloud) -> None:
    cloud.run("vmrunning", env={"NOCLOUD_vmMem": "1G"}).fails(2, "NOCLOUD_vmMem", "MB")


def test_files_that_others_may_write_are_skipped(cloud: Cloud) -> None:
    file = cloud.home / ".nocloud.conf"
    file.write_text("vmMem=333\n")
    file.chmod(0o666)
    done = cloud.run("vmtemplate", "-h").ok()
    assert "[333]" not in done.stdout and "[512]" in done.stdout
    assert file.name in done.stderr and "warning" in done.stderr and len(done.stderr.splitlines()) == 1
    file.chmod(0o644)
    assert memory_in_force(cloud) == "333"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_files_of_other_users_are_skipped(cloud: Cloud) -> None:
    file = cloud.home / ".nocloud.conf"
    file.write_text("vmMem=333\n")
    os.chown(file, 65534, 65534)
    done = cloud.run("vmtemplate", "-h").ok()
    assert "[512]" in done.stdout and "another user" in done.stderr


def test_a_file_that_may_not_be_used_hides_no_other(cloud: Cloud) -> None:
    """Another user's `.nocloud.conf`, in the current folder or at home, counts as if it weren't there."""
    (cloud.home / ".nocloud.conf").write_text("vmMem=333\n")
    (cloud.home / ".nocloud.conf").chmod(0o666)
    second = cloud.home / "config/nocloud/nocloud.conf"
    second.parent.mkdir(parents=True)
    second.write_text("vmMem=444\n")
    done = cloud.run("vmtemplate", "-h").ok()
    assert "[444]" in done.stdout and done.stderr.count("warning") == 1
    here = cloud.home / "here"
    here.mkdir()
    (here / ".nocloud.conf").write_text("vmMem=555\n")
    (here / ".nocloud.conf").chmod(0o666)
    done = cloud.run("vmtemplate", "-h", cwd=here).ok()
    assert "[444]" in done.stdout and "./.nocloud.conf is skipped: others may write to it" in done.stderr


# What counts from a ./.nocloud.conf that nobody allowed; typed by hand.
HARMLESS = [
    "vmMem", "vmCpu", "vmCpuCap", "vmCreateDiskSize", "vmCount", "vmGroup", "vmSubGroup", "vmDefaultGroup",
    "vmDefaultSubGroup", "vmCreateGroup", "vmStopTimeout", "vmWaitTimeout", "vmDownloadTimeout",
    "vmCold",
]  # fmt: skip


def test_which_settings_can_do_no_harm() -> None:
    assert [each.key for each in nocloud.SETTINGS if each.harmless and each.where != "unused"] == HARMLESS


TOLD = "not used, as they can have things run or opened: vmQemu, vmBaseDir (nocloud trust ./.nocloud.conf allows them)"


def test_a_repository_runs_and_opens_nothing(cloud: Cloud) -> None:
    """What its `.nocloud.conf` says of memory counts; what could have something run, only once it was allowed."""
    del cloud.env["NOCLOUD_vmBaseDir"]
    (cloud.home / ".nocloud.conf").write_text(f"vmBaseDir={cloud.base}\n")
    here = cloud.home / "repository"
    here.mkdir()
    conf, program = here / ".nocloud.conf", here / "q"
    program.write_text(f"#!/bin/sh\ntouch {here}/ran\n")
    program.chmod(0o755)
    conf.write_text("vmQemu=$PWD/q\nvmBaseDir=$PWD/tree\nvmMem=1003\n")
    cloud.env["PWD"] = str(here)
    code = (
        f"import os, sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import nocloud; config = nocloud.load_config()\n"
        "print(*map(config.__getitem__, ('vmQemu', 'vmBaseDir', 'vmMem')), sep=';')"
    )

    def in_force() -> Result:
        return cloud.execute([sys.executable, "-IS", "-c", code], cwd=here).ok()

    def refused() -> None:
        done = in_force()
        assert done.stdout == f";{cloud.base};1003\n"
        assert done.stderr == f"nocloud: warning: ./.nocloud.conf: {TOLD}\n"

    refused()
    image = cloud.home / "disk"
    cloud.execute(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"]).ok()
    cloud.run("vmtemplate", "x", "--image", image, cwd=here).ok()
    assert not (here / "ran").exists() and (cloud.base / "templates/x").is_dir()

    cloud.run("trust", "./.nocloud.conf", cwd=here).quiet()
    done = in_force()
    assert (done.stdout, done.stderr) == (f"{program};{here}/tree;1003\n", "")
    list_ = cloud.home / "config/nocloud/trusted"
    assert list_.stat().st_mode & 0o777 == 0o600
    cloud.execute(["sha256sum", "--check", "--strict", list_]).ok()
    list_.chmod(0o666)
    refused()  # whoever could write there could allow anything
    list_.chmod(0o600)

    conf.write_text(conf.read_text() + "# changed\n")
    refused()
    moved = cloud.home / "elsewhere"
    here.rename(moved)
    here.mkdir()
    conf.write_text((moved / ".nocloud.conf").read_text().replace("# changed\n", ""))
    assert in_force().stderr == ""  # it is the path and what is in it that was allowed


@pytest.mark.parametrize("line", ["vmMem=lots", "vmMem=$(touch x)", "if true; then", "vmQemu=`touch x`"])
def test_a_repository_keeps_nobody_from_working(cloud: Cloud, line: str) -> None:
    """Its mistakes are warnings, and errors once it was allowed, which it can't be then."""
    here = cloud.home / "repository"
    here.mkdir()
    (here / ".nocloud.conf").write_text(f"# first\n{line}\n")
    done = cloud.run("vmrunning", cwd=here).ok()
    assert done.stderr.startswith("nocloud running: warning: ./.nocloud.conf:2: ") and done.stderr.count("\n") == 1
    cloud.run("trust", ".nocloud.conf", cwd=here).fails(2, f"{here}/.nocloud.conf:2: ")
    assert not (cloud.home / "config/nocloud/trusted").exists() and not (here / "x").exists()


def test_what_can_not_be_allowed(cloud: Cloud) -> None:
    cloud.run("trust", "nothing").fails(1, "nothing")
    file = cloud.home / "conf"
    file.write_text("vmMem=64\n")
    file.chmod(0o666)
    cloud.run("trust", file).says(1, f"{file}: others may write to it", "use a copy of your own")
    odd = cloud.home / "a\n0  b"
    odd.mkdir()
    (odd / ".nocloud.conf").write_text("vmMem=64\n")
    cloud.run("trust", ".nocloud.conf", cwd=odd).fails(1, "its path has control characters")


@settings(max_examples=25)
@given(st.binary())
def test_any_repository_lets_one_work(content: bytes) -> None:
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ".nocloud.conf"
        path.write_bytes(content)
        before = os.getcwd()
        os.chdir(folder)
        try:
            config = nocloud.Config()
            config.read(nocloud.LOCAL_CONF, told.append)
        finally:
            os.chdir(before)
    assert config["vmQemu"] == "" and all(map(str.isprintable, map(nocloud.printable, told)))


def test_nokvm_means_tcg(cloud: Cloud) -> None:
    code = "print(nocloud.load_config()['vmAccel'])"
    assert cloud.script(code).ok().stdout == "tcg\n"
    cloud.env["NOCLOUD_NOKVM"] = "0"
    assert cloud.script(code).ok().stdout == "auto\n"


def test_where_the_tree_lies_by_default(cloud: Cloud) -> None:
    del cloud.env["NOCLOUD_vmBaseDir"]
    code = "print(nocloud.base_folder(nocloud.load_config()))"
    assert cloud.script(code).ok().stdout.strip() == str(cloud.home / "data/nocloud/kvm")
    del cloud.env["XDG_DATA_HOME"]
    assert cloud.script(code).ok().stdout.strip() == str(cloud.home / ".local/share/nocloud/kvm")
    (cloud.home / "Documents/kvm/VMs").mkdir(parents=True)
    assert cloud.script(code).ok().stdout.strip() == str(cloud.home / "Documents/kvm/VMs")
    (cloud.home / ".nocloud.conf").write_text("vmBaseDir=~/tree\n")
    assert cloud.script(code).ok().stdout.strip() == str(cloud.home / "tree")


# Description files ###################################################################################


def requests(text: str) -> list[tuple[object, ...]]:
    return [
        (w.template, w.count, w.type, w.settings, list(w.disks), w.prefix)
        for w in nocloud.parse_description(text, "FILE", "default")
    ]


def test_description_lines() -> None:
    text = (
        "# comment\n\n"
        "debian12:2\n"
        " debian12 : 2 : web : mem=1024 ; cpu=4;dsk=10, 20 ;name=web;gui # why\r\n"
        "alpine:1::name=db\n"
        "x:1:t:"
    )
    assert requests(text) == [
        ("debian12", 2, "default", {}, [], ""),
        ("debian12", 2, "web", {"vmMem": "1024", "vmCpu": "4", "vmGui": "yes"}, [10, 20], "web"),
        ("alpine", 1, "default", {}, [], "db"),
        ("x", 1, "t", {}, [], ""),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("debian12", "TEMPLATE:COUNT"),
        (":1", "empty"),
        ("debian12:", "1 to"),
        ("debian12:0", "1 to"),
        ("debian12:-1", "1 to"),
        ("debian12:1.5", "1 to"),
        ("debian12:abc", "abc"),
        ("de,bian:1", "','"),
        ("../x:1", "'.'"),
        ("debian12:1:a/b", "'/'"),
        ("debian12:1:web:mem=1G", "MB"),
        ("debian12:1:web:mem=", "mem"),
        ("debian12:1:web:mem", "mem"),
        ("debian12:1:web:dsk=", "dsk"),
        ("debian12:1:web:dsk=10G", "GB"),
        ("debian12:1:web:cpu=0", "cpu"),
        ("debian12:1:web:name=", "name="),
        ("debian12:1:web:name=a b", "' '"),
        ("debian12:1:web:name=é", "'é'"),
        ("debian12:1:web:gui=1", "gui"),
        ("debian12:1:web:mme=1024", "mem?"),
        ("debian12:1:web:mem=1024:x", "1024:x"),
        ("debian12:1:web:mem=1024,cpu=2", "mem"),
        ("debian12:1:web:name=x;dsk=" + ",".join(["1"] * 30), "at most"),
    ],
)
def test_description_lines_that_are_wrong(line: str, said: str) -> None:
    with pytest.raises(nocloud.UsageError) as raised:
        requests(f"# first\nfine:1\n{line}\n")
    assert str(raised.value).startswith("FILE:3: ") and said in str(raised.value) + raised.value.hint


@pytest.mark.parametrize("option", nocloud.CLONE_OPTIONS, ids=lambda option: option.name)
def test_each_option_sets_something(option: nocloud.CloneOption) -> None:
    """A setting that clones have, or a field; and a wrong word's hint lists them all."""
    (plain,) = nocloud.parse_description("x:1", "FILE", "default")
    assert option.sets in nocloud.SETTING or hasattr(plain, option.sets)
    assert option.sets not in nocloud.SETTING or nocloud.SETTING[option.sets].where in ("vm", "both")
    with pytest.raises(nocloud.UsageError) as raised:
        nocloud.parse_description("x:1::nonsense", "FILE", "default")
    assert f" {option.text}" in raised.value.hint and option.help


def test_any_error_of_a_line_names_it() -> None:
    """Whatever its constructor takes."""

    def fail(name: str) -> nocloud.VM:
        raise nocloud.CommandFailed([name], 3, "no")

    cloud = SimpleNamespace(tree=SimpleNamespace(need_template=fail))
    described = nocloud.parse_description("\nfine:1", "FILE", "default")
    with pytest.raises(nocloud.CommandFailed, match=r"^FILE:2: fine: no$") as raised:
        nocloud.check_requests(cloud, "pf", described, False)  # type: ignore[arg-type]
    assert raised.value.returncode == 3


def test_an_empty_description_is_an_error() -> None:
    for text in ("", "# nothing\n\n"):
        with pytest.raises(nocloud.UsageError, match="FILE"):
            requests(text)


@given(st.text())
def test_any_description_is_read_or_refused(text: str) -> None:
    try:
        requests(text)
    except nocloud.UsageError as error:
        assert str(error).startswith("FILE:")


NAMES = "|".join(option.name for option in nocloud.CLONE_OPTIONS if option.name != "user-data")  # which is a file


@given(
    st.from_regex(
        rf"[a-z]{{1,9}} ?: ?[0-9]{{1,5}}(:[a-z]{{0,5}}(:(({NAMES}|x)=?[0-9a-z,]{{0,5}};?){{0,4}})?)?", fullmatch=True
    )
)
def test_lines_that_look_right_are_read_or_refused(line: str) -> None:
    try:
        (request,) = requests(line)
    except nocloud.UsageError as error:
        assert str(error).startswith("FILE:1: ")
        return
    assert 1 <= int(str(request[1])) <= 1000


def test_a_byte_order_mark_is_no_part_of_a_file(cloud: Cloud) -> None:
    """Of a configuration, a description from a file or stdin, a VM's conf: some editors begin UTF-8 with one."""
    add_blank(cloud)
    text = "\ufeffblank:1:web:name=web\n"
    (cloud.home / "shop").write_text(text)
    (cloud.home / ".nocloud.conf").write_text("\ufeffvmGroup=marked\n")
    conf = cloud.base / "templates/blank/blank.conf"
    conf.write_text("\ufeff" + conf.read_text())
    cloud.run("vminstantiate", "-f", cloud.home / "shop", "--dry-run").ok()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import nocloud\n"
        "config = nocloud.load_config(); print(config['vmGroup'], nocloud.read_description('-', 'web')[0].template)\n"
        "with nocloud.Cloud(config) as cloud: print(cloud.tree.need_template('blank').conf['vmName'])"
    )
    said = cloud.execute([sys.executable, "-IS", "-c", code], input=text)
    assert (said.ok().stdout, said.stderr) == ("marked blank\nblank\n", "")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00" * 100])
def test_a_description_that_is_no_text(cloud: Cloud, content: bytes) -> None:
    file = cloud.home / "shop"
    file.write_bytes(content)
    cloud.run("vminstantiate", "-f", file).fails(2, str(file))
