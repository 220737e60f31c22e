"""What can be typed. The table of options is the contract's, typed by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROGRAM, Cloud, Result, nothing_made

import nocloud

# Letter or long option -> whether it takes a value (None: it may).
Options = dict[str, "bool | None"]
OPTIONS: dict[str, Options] = {
    "vmtemplate": {
        "--warm": False,
        "--cold": False,
        "-L": False,
        "--list": False,
        "--available": False,
        "--image": True,
        "--sha256": True,
        "--sha512": True,
        "--insecure": False,
        "--build": True,
        "--include": True,
        "--rebuild": False,
        "--from": True,
        "--layer": False,
        "--no-clean": False,
        "--tree": False,
        "--prune": False,
        "-y": False,
        "--yes": False,
        "--delete": False,
        "--mem": True,
        "--cpu": True,
        "--user": True,
        "--init": True,
        "--arch": True,
        "--uefi": False,
        "--secure-boot": False,
        "--tpm": False,
    },
    "vminstantiate": {
        "--cold": False,
        "-n": True,
        "-C": True,
        "-g": True,
        "-t": True,
        "-f": True,
        "-o": True,
        "--allow-share": True,
        "-w": None,
        "--wait": None,
        "--dry-run": False,
        "--force": False,
    },
    "vmapply": {
        "-f": True,
        "-g": True,
        "--describe": False,
        "--dry-run": False,
        "--restart": False,
        "--replace": False,
        "-w": None,
        "--wait": None,
        "--allow-share": True,
        "-y": False,
        "--yes": False,
        "--force": False,
    },
    "vmchange": {
        "-n": True,
        "-m": True,
        "-c": True,
        "-C": True,
        "-d": True,
        "--add-disk": True,
        "--remove-disk": True,
        "--ports": True,
        "--name": True,
        "--group": True,
        "--type": True,
        "-y": False,
        "--yes": False,
    },
    "vmcreate": {
        "-n": True,
        "-i": True,
        "-m": True,
        "-c": True,
        "-C": True,
        "-d": True,
        "-a": False,
        "--uefi": False,
        "--secure-boot": False,
        "--tpm": False,
    },
    "vmrun": {
        "--cold": False,
        "-f": True,
        "-r": True,
        "-g": False,
        "-s": True,
        "--group": True,
        "--allow-share": True,
        "--add": False,
        "--apply": False,
        "-y": False,
        "--yes": False,
        "--background": False,
        "--destroy": False,
        "--force": False,
    },
    "vm": {"-n": True, "-g": True, "-t": True, "-i": True, "-G": False},
    "vmconsole": {"-n": True, "-g": True, "-t": True, "-s": False, "--screenshot": True},
    "vmlog": {"-n": True, "-g": True, "-t": True, "-f": False, "-q": False},
    "vmmanage": {"-n": True, "-g": True, "-t": True},
    "vmrunning": {"-g": True, "-t": True, "-a": False, "-l": False, "--json": False},
    "vmport": {"-n": True, "-g": True, "-t": True, "-L": False, "--delete": False},
    "vmstop": {
        "-g": True,
        "-t": True,
        "-d": False,
        "-n": True,
        "--kill": False,
        "--timeout": True,
        "--save": False,
        "--discard": False,
        "-y": False,
        "--yes": False,
    },
    "vmstart": {"-g": True, "-t": True, "-n": True, "-w": None, "--wait": None},
    "vmpause": {"-g": True, "-t": True, "-n": True},
    "vmresume": {"-g": True, "-t": True, "-n": True},
    "vmsnapshot": {
        "-g": True,
        "-t": True,
        "-n": True,
        "-L": False,
        "--list": False,
        "--ram": False,
        "--sync": False,
        "--delete": False,
    },
    "vmrollback": {"-g": True, "-t": True, "-n": True, "-y": False, "--yes": False, "--exact": False},
    "vmssh": {},
    "vmcp": {
        "-r": False,
        "--recursive": False,
        "-p": False,
        "--preserve": False,
        "-O": False,
        "--old": False,
        "--sync": False,
    },
    "export": {
        "-g": True,
        "-t": True,
        "-n": True,
        "-f": True,
        "--to": True,
        "--tar": False,
        "--with-keys": False,
        "--clean": False,
        "--chain": False,
    },
    "import": {"-g": True},
    "ssh-config": {"--install": False, "--remove": False},
    "vmupgrade": {"--timeout": True},
    "vminventory": {"--list": False, "--host": True},
    "net": {"--private": False, "--bridge": False},
    "nocloud-bridge": {},
    "links": {},
    "trust": {},
    "enable": {"--user": False},
    "disable": {"--user": False},
    "doctor": {"--json": False, "--deep": False},
    "completion": {},
    "man": {},
}
# For the options whose values are no numbers.
VALUES = {
    "--ports": "8064:80",
    "--remove-disk": "4",
    "--init": "ssh",
    "--user": "me",
    "--arch": "aarch64",
    "--sha256": "a" * 64,
    "--sha512": "a" * 128,
}
EVERYWHERE: Options = {"-h": False, "--help": False, "-v": False, "--version": False, "--debug": False}


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("links")
    done = subprocess.run(
        [sys.executable, "-IS", PROGRAM, "links", folder], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def by_name(cloud: Cloud, links: Path, name: str, *words: object) -> Result:
    """The command called by its link's name; the interpreter is named so that this works for every Python."""
    return cloud.execute([sys.executable, "-IS", links / name, *words])


def declared(help: str) -> Options:
    """The options that a help text lists; a value in brackets may be left out."""
    found: Options = {}
    for line in help.splitlines():
        if line.startswith("  -"):
            for part in re.split(r" {2,}", line.strip())[0].split(", "):
                name, _, value = part.partition(" ")
                found[name] = None if value.startswith("[") else bool(value)
    return found


def test_every_command_is_in_the_table() -> None:
    names = [command.alias or command.name for command in nocloud.COMMANDS.values() if not command.hidden]
    for name in names:
        assert name in OPTIONS, f"{name} isn't in the table: type its options into OPTIONS of tests/test_commands.py"


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_contract_is_there_and_no_other(cloud: Cloud, name: str) -> None:
    done = cloud.run(name, "-h").ok()
    assert done.stderr == ""
    shown, known = declared(done.stdout), {**OPTIONS[name], **EVERYWHERE}
    for option, takes in known.items():
        assert option in shown, f"{option} is not in:\n{done.stdout}"
        assert shown[option] is takes, (option, done.stdout)
    for line in done.lines:
        if line.startswith("  -") and "--fdpass" not in line and "--tap" not in line:  # nocloud's own calls of itself
            assert set(declared(line)) & set(known), line


def parsed(argv: list[str]) -> tuple[dict[str, object], list[str]]:
    """What a command line means: the options' values, and the operands."""
    command, program, words = nocloud.find_command(argv)
    assert command
    options, operands = nocloud.split_operands(command, words)
    return vars(nocloud.build_parser(command, program, nocloud.Config()).parse_args(options)), operands


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("vm")])
def test_both_ways_of_calling_parse_the_same(name: str) -> None:
    nothing, _ = parsed([name])
    for option, takes in OPTIONS[name].items():
        value = VALUES.get(option, "64")
        joined = f"{option}={value}" if option.startswith("--") else option + value
        for words in [[option, value], [joined]] if takes else [[option]]:
            own = parsed([name, *words, "--", "word"])
            assert own == parsed(["nocloud", name, *words, "--", "word"])
            assert own == parsed(["nocloud", name[2:] or name, *words, "--", "word"])
            (got,) = (got for key, got in own[0].items() if got != nothing[key])
            assert value in str(got) if takes else got is True, (words, own)
            assert own[1] == ["word"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("vm", "vmcreate", "vmrun") else pytest.mark.long)
        for name in OPTIONS
        if name.startswith("vm")
    ],
)
def test_by_name_and_as_a_subcommand_it_is_the_same(cloud: Cloud, links: Path, name: str) -> None:
    own = by_name(cloud, links, name, "-h").ok()
    sub = cloud.run(name, "-h").ok()
    full = cloud.execute([sys.executable, "-IS", links / "nocloud", name, "-h"]).ok()
    body = own.stdout.replace(f"usage: {name} ", "X ")
    assert body == sub.stdout.replace(f"usage: nocloud {name[2:] or name} ", "X ")
    assert body == full.stdout.replace(f"usage: nocloud {name} ", "X ")
    assert own.stdout.startswith(f"usage: {name}")
    for words in (("--nothing",), ("-Z",), ("-n" if name == "vmcreate" else "-r" if name == "vmrun" else "-g",)):
        own, sub = by_name(cloud, links, name, *words), cloud.run(name, *words)
        assert own.status == sub.status == 2
        own.fails(2)
        assert own.stderr.startswith(f"{name}: ")


def test_short_and_long_are_the_same(cloud: Cloud) -> None:
    for name, options in OPTIONS.items():
        shown = cloud.run(name, "-h").ok().stdout
        for option in options:
            if len(option) == 2:
                assert re.search(rf"^  {option}[ ,].*--\w", shown, re.M), f"{name} {option} has no long form"


@pytest.mark.parametrize("name", OPTIONS)
def test_help_and_version_need_nothing(cloud: Cloud, name: str) -> None:
    for words in (("-h",), ("--help",), ("-h", "--debug")):
        done = cloud.run(name, *words)
        assert (done.status, done.stderr) == (0, "") and done.stdout.startswith("usage: "), repr(done)
    for words in (("-v",), ("--version",)):
        assert cloud.run(name, *words).ok().stdout == f"nocloud {nocloud.__version__}\n"
    assert not cloud.base.exists()


def test_help_shows_the_defaults_in_force(cloud: Cloud) -> None:
    (cloud.home / ".nocloud.conf").write_text("vmCount=7\nvmGroup=mine\nvmStopTimeout=99\n")
    shown = cloud.run("vminstantiate", "-h").ok().stdout
    assert "[7]" in shown and "[mine]" in shown and "[default]" in shown and "[300]" in shown
    assert "[99]" in cloud.run("vmstop", "-h").ok().stdout


def test_nocloud_alone_lists_the_commands(cloud: Cloud) -> None:
    shown = cloud.run("").ok()
    assert shown.stderr == ""
    for name in OPTIONS:
        assert re.search(rf"^  .*\b{name}\b.* \S", shown.stdout, re.M), name
    assert max(map(len, cloud.run("", env={"COLUMNS": "80"}).ok().lines)) <= 80
    assert "configure" not in shown.stdout and "  complete " not in shown.stdout
    for word in ("-h", "--help"):
        assert cloud.execute([sys.executable, "-IS", PROGRAM, word]).ok().stdout == shown.stdout
    for word in ("-v", "--version"):
        assert cloud.execute([sys.executable, "-IS", PROGRAM, word]).ok().stdout == f"nocloud {nocloud.__version__}\n"
    cloud.execute([sys.executable, "-IS", PROGRAM, "-x"]).fails(2, "-x")


def test_unknown_commands(cloud: Cloud) -> None:
    cloud.execute([sys.executable, "-IS", PROGRAM, "instanciate"]).fails(127, "instanciate", "instantiate?")
    cloud.execute([sys.executable, "-IS", PROGRAM, "vmfrobnicate"]).fails(127, "vmfrobnicate")
    cloud.execute([sys.executable, "-IS", PROGRAM, ""]).fails(127)
    for word, ours in (
        ("ls", "vmrunning -a"),
        ("list", "vmrunning -a"),
        ("rm", "vmstop -d -g GROUP, or VM"),
        ("exec", "vmssh VM [COMMAND]"),
        ("launch", "vminstantiate -n TEMPLATE"),
        ("down", "vmstop -g GROUP, or VM"),
    ):
        cloud.run(word).says(127, f"{word}: no such command", f"here it is {ours}")
    for ours, theirs in (line.split(": ") for line in nocloud.packaged_list("elsewhere")):
        assert ours.split()[0] in nocloud.ALIASES and not {*theirs.split()} & {*nocloud.COMMANDS}, ours
    link = cloud.home / "vmnothing"
    link.symlink_to(PROGRAM)
    done = cloud.execute([sys.executable, "-IS", link])
    assert done.status in (0, 127)  # a name of the user's own: as nocloud itself


# As getopts ##########################################################################################


def test_values_attached_and_letters_together(blank: Cloud) -> None:
    done = blank.run("vminstantiate", "-nblank", "-C3", "-gpftest", "-tweb", "-oname=web", "--dry-run").ok()
    assert "3 clones in pftest/web" in done.stdout
    blank.run("vminstantiate", "-n", "blank", "-C2", "-g", "pftest", "-o", "name=web").ok()
    blank.run("vminstantiate", "-n", "blank", "-g", "other", "-o", "name=web").ok()
    blank.run("vmstop", "-dg", "pftest").quiet()
    assert [line.split()[1] for line in blank.run("vmrunning").ok().lines] == ["other/default"]
    blank.run("vmstop", "-dgother").quiet()
    assert blank.run("vmrunning").ok().stdout == ""
    assert [line.split()[0] for line in blank.run("vmrunning", "-agtemplates").ok().lines] == ["blank"]


def test_long_options_with_equals_and_never_abbreviated(blank: Cloud) -> None:
    done = blank.run("vminstantiate", "--template=blank", "--count=2", "--group=x", "--dry-run").ok()
    assert "2 clones in x/default" in done.stdout
    with nothing_made(blank):
        for word in ("--coun=2", "--dry", "--templ=x"):
            blank.run("vminstantiate", "-n", "blank", word).fails(2)


def test_two_dashes_end_the_options(blank: Cloud) -> None:
    blank.run("vmrunning", "--").ok()
    blank.run("vmrunning", "--", "-a").fails(2, "-a")
    blank.run("vmtemplate", "--delete", "--", "blank").quiet()


def test_an_operand_ends_the_options_of_vmssh(cloud: Cloud) -> None:
    """What follows the VM belongs to ssh, also what looks like ours; before it, what ssh hasn't is ours."""
    cloud.run("vmssh", "web00", "-h").fails(1, "web00: no such VM")
    cloud.run("vmssh", "web00", "--debug", "--version").fails(1, "web00")
    cloud.run("vmssh", "--", "web00", "-v").fails(1, "web00")
    assert cloud.run("vmssh", "-h", "web00").ok().stdout.startswith("usage")
    cloud.run("vmssh", "-Z", "web00").fails(2, "-Z")
    for words in ("-x", "-4", "-L 8080:localhost:80", "-L8080:localhost:80", "-NfD 1080", "-o Port=2", "--debug -l -v"):
        cloud.run("vmssh", *words.split(), "web00", "-h").fails(1, "web00: no such VM")
        cloud.run("vmssh", *words.split()).says(2, "which VM?", "vmssh VM|IP [WORDS...]; vmrunning lists the VMs")
    cloud.run("vmssh", "-L").fails(2, "which VM")
    cloud.run("vmssh").fails(2, "which VM")


def test_words_go_to_ssh_untouched(blank: Cloud) -> None:
    """ssh is replaced by a program that shows its words: the user's options, which win, ours, the address, the rest."""
    from support import replace_program

    blank.run("vminstantiate", "-n", "blank", "-g", "pf", "-o", "name=web").ok()
    address = blank.conf("pf/default/web00")["vmAddress"]
    path = replace_program(blank.home / "bin", "ssh", 'printf "%s\\n" "$@"')
    script = (
        "nocloud.wait_ssh = nocloud.pin_host_key = lambda wait: None\n"  # the guest `blank` has no ssh to wait for
        "sys.exit(nocloud.main(['vmssh', '-4', 'ann@web00', '-L', '8080:localhost:80', 'ls -l', '--', '-t']))\n"
    )
    before = f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import nocloud\n"
    done = blank.execute([sys.executable, "-IS", "-c", before + script], env={"PATH": path}).ok()
    assert done.lines[:5] == ["-4", "-l", "ann", "-L", "8080:localhost:80"]
    assert done.lines[done.lines.index(address) :] == [address, "ls -l", "--", "-t"]
    assert "StrictHostKeyChecking=yes" in done.lines and "GlobalKnownHostsFile=/dev/null" in done.lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nothing", "unrecognized arguments: --nothing"),
        ("--nothing=5", "unrecognized arguments: --nothing=5"),
        ("-Zd", "unrecognized arguments: -Zd"),
        ("-g", "argument -g/--group: expected one argument"),
        ("-dg", "argument -g/--group: expected one argument"),
        ("-dx", "argument -d/--destroy: ignored explicit argument 'x'"),
        ("--kill=x", "argument --kill: ignored explicit argument 'x'"),
        ("--timeout x", "argument --timeout: 'x': expected a whole number from 0 to 86400, in seconds"),
        ("--timeout=", "argument --timeout: '': expected a whole number from 0 to 86400, in seconds"),
        ("--timeout -1", "argument --timeout: '-1': expected a whole number from 0 to 86400, in seconds"),
    ],
)
def test_what_is_said_of_a_wrong_option(cloud: Cloud, words: str, said: str) -> None:
    done = cloud.run("vmstop", *words.split(), "-g", "pf") if words[-1] != "g" else cloud.run("vmstop", words)
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == f"nocloud stop: {said}\n(hint: nocloud stop -h shows how it is called)\n"


def test_a_value_that_may_be_left_out() -> None:
    """vminstantiate -w takes a number after it, joined or not, and nothing else."""
    for words, wait, operands in (
        (["-w"], True, []),
        (["-w", "5"], 5, []),
        (["-w5"], 5, []),
        (["-w=5"], 5, []),
        (["--wait=5"], 5, []),
        (["-w", "x"], True, ["x"]),
        (["-w", "--dry-run"], True, []),
        ([], None, []),
    ):
        values, rest = parsed(["vminstantiate", *words])
        assert (values["wait"], rest) == (wait, operands), words


def test_help_is_as_wide_as_the_terminal(cloud: Cloud) -> None:
    wide = cloud.run("vmstop", "-h", env={"COLUMNS": "200"}).ok().lines
    small = cloud.run("vmstop", "-h", env={"COLUMNS": "50"}).ok().lines
    assert max(map(len, small)) <= 48 and len(small) > len(wide)
    assert " ".join(" ".join(small).split()) == " ".join(" ".join(wide).split())
    assert (
        "  -t TYPE, --type TYPE  only this type" in wide and "  -d, --destroy         destroy them too: disks," in small
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("vmstop",), "-g"),
        (("vmstop", "-d"), "-g"),
        (("vmstart",), "-g"),
        (("vmlog",), "-n"),
        (("vmlog", "-n", "web00", "web01"), "web01"),
        (("vmconsole", "web00", "web01"), "web01"),
        (("vmstop", "-g"), "-g"),
        (("vmstop", "-g", ""), ""),
        (("vmstop", "-n", ""), ""),
        (("vmstop", "-g", "pf", "--timeout", "-1"), "timeout"),
        (("vmstop", "-g", "pf", "--timeout", "x"), "x"),
        (("vmrunning", "pf"), "pf"),
        (("vmrunning", "-g", ""), ""),
        (("vminventory", "x"), "x"),
        (("vminventory", "--host"), "--host"),
        (("links",), "DIR"),
        (("links", "a", "b"), "b"),
        (("trust",), "FILE"),
        (("trust", "a", "b"), "b"),
        (("net",), "up"),
        (("completion",), "shell"),
        (("completion", "tcsh"), "tcsh"),
        (("completion", "bash", "zsh"), "zsh"),
        (("man", "vmssh"), "vmssh"),
        (("complete",), "shell"),
        (("complete", "tcsh"), "shell"),
    ],
)
def test_wrong_usage_is_2(cloud: Cloud, words: tuple[str, ...], said: str) -> None:
    cloud.run(*words).fails(2, said)
    assert not cloud.base.exists()


def test_things_that_are_not_there_are_1(cloud: Cloud) -> None:
    for words in (
        ("vmstop", "-g", "pf"),
        ("vmstop", "-n", "web00"),
        ("vmstop", "web00"),
        ("vmstop", "-d", "web00"),
        ("vmstart", "web00"),
        ("vmpause", "web00"),
        ("vmlog", "web00"),
        ("vmconsole", "-s", "web00"),
        ("vmmanage", "web00"),
        ("vmstop", "-t", "web"),
        ("vmrunning", "-g", "pf"),
        ("vmport", "-L", "-g", "pf"),
        ("vmssh", "web00"),
        ("vmssh", "10.88.0.9"),
    ):
        cloud.run(*words).fails(1, words[-1])
    said = "pf: no such group, so there is nothing to destroy"
    cloud.run("vmstop", "-d", "-g", "pf").says(0, said, "vmrunning -a lists them")
    cloud.run("vmrunning").quiet()
    assert not cloud.base.exists()


# Links ###############################################################################################


def test_links(cloud: Cloud, links: Path) -> None:
    names = {name for name in OPTIONS if name.startswith("vm")} | {"nocloud", "nocloud-bridge"}
    assert names <= set(os.listdir(links))
    for name in os.listdir(links):
        assert (links / name).resolve() == PROGRAM
    again = cloud.run("links", links).quiet()
    assert again.argv
    folder = cloud.home / "new/bin"
    cloud.run("links", folder).quiet()
    assert set(os.listdir(folder)) == set(os.listdir(links))
    (folder / "vmstop").unlink()
    (folder / "vmstop").write_text("mine")
    kept = f"{folder / 'vmstop'}: is there and is no symlink; it is kept"
    cloud.run("links", folder).says(1, kept, "move it away, or choose another folder")
    assert (folder / "vmstop").read_text() == "mine"


def test_an_inventory_by_another_name(cloud: Cloud) -> None:
    """What ansible calls, with the words that it calls it with."""
    (cloud.home / "hosts").symlink_to(PROGRAM)
    done = cloud.execute([sys.executable, "-IS", cloud.home / "hosts", "--list"])
    assert done.ok().stdout == cloud.run("vminventory", "--list").ok().stdout
    assert cloud.execute([sys.executable, "-IS", cloud.home / "hosts", "--host", "x"]).ok().stdout == "{}\n"


def test_the_checkouts_own_file_runs_through_a_link(cloud: Cloud, links: Path) -> None:
    assert cloud.execute([links / "vmrunning", "-v"]).ok().stdout == f"nocloud {nocloud.__version__}\n"


# Surroundings ########################################################################################


def test_a_reader_that_went_away(cloud: Cloud) -> None:
    """`vmrunning -h | true`: no complaint, no traceback."""
    for words in (("vminstantiate", "-h"), ("", "-h"), ("vminventory", "--list")):
        argv = [word for word in cloud.argv(*words) if word]
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            argv, stdout=write, stderr=subprocess.PIPE, env=cloud.env, cwd=cloud.home, text=True, check=False
        )
        os.close(write)
        assert done.stderr == "" and done.returncode in (0, 1, 141), done


@pytest.mark.parametrize("fd", [0, 1, 2])
def test_a_closed_standard_descriptor(cloud: Cloud, fd: int) -> None:
    """`vmrunning >&-` of a cron job."""
    words = " ".join(cloud.argv("vmrunning", "-a"))
    done = cloud.execute(["sh", "-c", f"exec {fd}>&-; exec {words}"])
    assert done.status in (0, 1) and "Traceback" not in done.stderr and "defect" not in done.stderr, repr(done)


def test_without_a_home(cloud: Cloud) -> None:
    env = {key: value for key, value in cloud.env.items() if key not in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    done = subprocess.run(cloud.argv("vmrunning"), env=env, cwd=cloud.home, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_removed_working_folder(cloud: Cloud) -> None:
    folder = cloud.home / "gone"
    folder.mkdir()
    words = " ".join(cloud.argv("vmrunning"))
    done = cloud.execute(["sh", "-c", f"rmdir {folder}; exec {words}"], cwd=folder)
    assert (done.status, done.stdout) == (0, "") and "Traceback" not in done.stderr, repr(done)


def test_a_locale_without_utf8(cloud: Cloud) -> None:
    cloud.run("vmstop", "-n", "é", env={"LC_ALL": "C", "LANG": "C"}).fails(1, "no such VM")
    cloud.run("vmstop", "-n", "\udcff", env={"LC_ALL": "C"}).fails(1, "no such VM")


def test_control_characters_do_not_reach_the_terminal(cloud: Cloud) -> None:
    done = cloud.run("vmssh", "a\x1b[31mb\nc")
    done.fails(1, "no such VM")
    assert "\x1b" not in done.stderr


def test_debug_shows_a_traceback_only_when_asked_for(cloud: Cloud) -> None:
    cloud.run("vmssh", "web00").fails(1)
    done = cloud.run("vmssh", "--debug", "web00")
    assert done.status == 1 and "vmssh" not in done.stdout
