"""The module's own order: sections, sizes of functions, what may be named where, and what importing it costs.

`python tests/test_layout.py` prints each section's size, what it uses, and what is against the order.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from support import PROGRAM, ROOT

SECTIONS = [
    "Errors, records, reports",
    "Files, locks, waits",
    "Settings",
    "Programs",
    "Disks",
    "QMP",
    "VMs that the bash tools started",
    "Names and the VM tree",
    "qemu and its command line",
    "Networks",
    "The private network",
    "The host's bridge",
    "Ports",
    "Shared folders",
    "Identity",
    "Catalogue and downloads",
    "Templates",
    "Building templates",
    "Clones",
    "Stopping and destroying",
    "Starting",
    "Waiting until ready",
    "Snapshots",
    "Changing VMs",
    "Work in a template's guest",
    "Consoles",
    "Supervisor",
    "Inventory",
    "Doctor",
    "Export and import",
    "Command lines",
    "Commands",
    "Commands for ways in and hosts",
    "Completion and manual",
    "Installation",
    "Dispatch",
]

TEXT = PROGRAM.read_text()
MODULE = ast.parse(TEXT)
BANNERS = [
    (number, match.group(1))
    for number, line in enumerate(TEXT.splitlines(), 1)
    for match in [re.fullmatch(r"# (\S.*?) #{3,}", line)]
    if match
]


ORDER = {name: number for number, (_, name) in enumerate(BANNERS)}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def section(line: int) -> str:
    """The section that a line is in; "" is what stands above the first."""
    return next((name for number, name in reversed(BANNERS) if number <= line), "")


def sizes() -> dict[str, int]:
    """Each section's lines: from its banner to the next one."""
    ends = [*(number for number, _ in BANNERS[1:]), len(TEXT.splitlines()) + 1]
    return {name: end - number for (number, name), end in zip(BANNERS, ends)}


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(MODULE) if isinstance(node, FUNCTIONS)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What is evaluated when the module runs: no annotations, nothing under TYPE_CHECKING."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
            and name == "body"
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from run_time_nodes(child)


def test_sections_stand_in_the_order_of_the_architecture() -> None:
    names = [name for _, name in BANNERS]
    assert names == SECTIONS


def contents() -> list[tuple[str, str]]:
    """The list at the top of the module, in its docstring or in the comment below it: `NAME  what it owns`."""
    head = TEXT[: TEXT.index("\nfrom ")].splitlines()
    names = "|".join(map(re.escape, ORDER))
    found = (re.fullmatch(rf"#? +({names})  +(\S.*)", line) for line in head)
    return [(match.group(1), match.group(2)) for match in found if match]


def test_a_list_at_the_top_names_every_section_in_one_line() -> None:
    assert [name for name, _ in contents()] == list(ORDER)


def test_every_section_says_what_it_owns() -> None:
    lines = TEXT.splitlines()
    for number, name in BANNERS:
        assert lines[number] == "#" and re.match(r"# \S", lines[number + 1]), name


def test_sections_are_short() -> None:
    assert not {name: size for name, size in sizes().items() if size > 900}


def test_functions_are_short() -> None:
    long = {node.name: length(node) for node in functions() if length(node) > 60}
    assert not long
    assert statistics.median(map(length, functions())) <= 8
    for name in ("machine_args", "cpu_args", "firmware_args", "disk_args", "net_args", "console_args", "monitor_args"):
        (builder,) = (node for node in functions() if node.name == name)
        assert length(builder) <= 40


def test_every_signature_is_typed() -> None:
    for node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
        assert not bare and node.returns is not None, node.name


STARTERS = re.compile(r"subprocess\..*|os\.(exec\w+|spawn\w+|posix_spawn\w*|fork|forkpty|system|popen)|pty\..*")


def test_only_programs_starts_processes() -> None:
    named = []
    for node in run_time_nodes(MODULE):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and STARTERS.fullmatch(ast.unparse(node)):
            named.append((section(line), line, ast.unparse(node)))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "subprocess" in ast.unparse(node):
            named.append((section(line), line, ast.unparse(node)))
    assert [each for each in named if each[0] != "Programs"] == []


def test_only_reporting_writes() -> None:
    assert not [node.lineno for node in ast.walk(MODULE) if isinstance(node, ast.Name) and node.id == "print"]
    streams = [
        node.lineno
        for node in ast.walk(MODULE)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write", "sys.stdout.buffer")
    ]
    assert {section(line) for line in streams} <= {"Errors, records, reports"}


def test_no_shell_and_no_evaluation() -> None:
    for node in ast.walk(MODULE):
        assert not (isinstance(node, ast.keyword) and node.arg == "shell")
        assert not (isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__"))
        assert "pickle" not in ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else True


def bound(node: ast.AST) -> set[str]:
    """The names that a scope (a function, lambda, class or comprehension) binds itself; not those of scopes in it."""
    names = {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)} if hasattr(node, "args") else set()
    unseen = list(ast.iter_child_nodes(node))
    for part in unseen:
        if isinstance(part, (*FUNCTIONS, ast.ClassDef)):
            names.add(part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in part.names}
        elif isinstance(part, ast.ExceptHandler) and part.name:
            names.add(part.name)
        if not isinstance(part, (*FUNCTIONS, ast.Lambda, ast.ClassDef, *COMPREHENSIONS)):
            unseen += ast.iter_child_nodes(part)
    return names - {name for part in unseen if isinstance(part, ast.Global) for name in part.names}


def free_names(node: ast.AST, hidden: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """What a piece of the module looks up in the module when it runs: no local names, no annotations."""
    if isinstance(node, ast.Name) and node.id not in hidden:
        yield node
    within = hidden
    if isinstance(node, (*FUNCTIONS, ast.Lambda, ast.ClassDef, *COMPREHENSIONS)):
        within |= bound(node)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or name in ("annotation", "returns"):
                continue
            # Functions in a class don't see its names; decorators, defaults and base classes stand outside.
            outside = name != "body" and not isinstance(node, COMPREHENSIONS)
            if outside or (isinstance(node, ast.ClassDef) and isinstance(child, FUNCTIONS)):
                yield from free_names(child, hidden)
            else:
                yield from free_names(child, within)


def definitions(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """The module's own names, and the lines that they are first bound at; under an `if` of the module, too."""
    for node in body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from ((part.id, part.lineno) for part in ast.walk(target) if isinstance(part, ast.Name))
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from definitions([*node.body, *node.orelse])


DEFINED = dict(reversed([*definitions(MODULE.body)]))


def uses(module: ast.Module = MODULE) -> Iterator[tuple[str, int, str, str]]:
    """Each use of one of the module's names at run time: its section, its line, the function (or so), the name."""
    for top in module.body:
        if isinstance(top, ast.If) and ast.unparse(top.test) == "TYPE_CHECKING":
            continue
        for part in free_names(top):
            if isinstance(part.ctx, ast.Load) and part.id in DEFINED:
                yield section(part.lineno), part.lineno, getattr(top, "name", "the module"), part.id


def uses_of_sections_below(module: ast.Module = MODULE) -> list[str]:
    return [
        f"section {here}: {function} (line {line}) uses {name} of section {section(DEFINED[name])}"
        for here, line, function, name in uses(module)
        if ORDER.get(section(DEFINED[name]), -1) > ORDER.get(here, -1)
    ]


def test_each_section_uses_only_those_above_it() -> None:
    assert uses_of_sections_below() == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def f(): return main()", True),
        ("def f(x=main): pass", True),
        ("def f(): return [main for x in y]", True),
        ("def f(): return lambda: main", True),
        ("class f:\n main = 1\n def g(self): return main", True),
        ("class f(main): pass", True),
        ("x = {1: main}", True),
        ("def f(main): return main", False),
        ("def f():\n main = 1\n return lambda: main", False),
        ("def f(): return [main for main in y]", False),
        ("def f(x: main) -> main: pass", False),
        ("class f:\n main: main", False),
    ],
)
def test_what_is_a_use(code: str, found: bool) -> None:
    """`main` is of the last section; the code stands in the first line."""
    assert bool(uses_of_sections_below(ast.parse(code))) is found


def test_only_the_standard_library_is_imported() -> None:
    names = set()
    for node in ast.walk(MODULE):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names <= set(sys.stdlib_module_names)


def test_what_is_imported_for_types_is_there_at_run_time() -> None:
    """mypy and ruff see the one list, the program has the other."""
    guard = next(each for each in MODULE.body if isinstance(each, ast.If) and ast.unparse(each.test) == "TYPE_CHECKING")
    typed = {name.name for each in guard.body if isinstance(each, ast.Import) for name in each.names}
    later = next(each.value for each in guard.orelse if isinstance(each, ast.Assign))
    assert {name for name in typed if "." not in name} == set(ast.literal_eval(later))


def test_importing_it_does_nothing_and_costs_little() -> None:
    code = (
        f"import sys, os, threading; sys.path.insert(0, {str(ROOT)!r})\n"
        "def state(): return os.listdir('/proc/self/fd'), threading.active_count(), dict(os.environ), os.getcwd()\n"
        "before = set(sys.modules), *state()\n"
        "import nocloud\n"
        "after = set(sys.modules), *state()\n"
        "assert before[1:] == after[1:]\n"
        "print(*(after[0] - before[0]))\n"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    heavy = {
        "subprocess",
        "json",
        "typing",
        "dataclasses",
        "pathlib",
        "argparse",
        "socket",
        "logging",
        "shutil",
        "tempfile",
        "inspect",
        "ctypes",
        "urllib",
        "concurrent",
        "difflib",
        "shlex",
        "asyncio",
    }
    assert not heavy & set(done.stdout.split())


def test_it_is_python_3_9() -> None:
    ast.parse(TEXT, feature_version=(3, 9))
    for node in ast.walk(MODULE):
        assert not isinstance(node, getattr(ast, "Match", ())), node


def test_comments_are_about_the_program() -> None:
    """No registry's or machine's name, no ticket, no private path."""
    for line in TEXT.splitlines():
        assert not re.search(r"pypi|pythonhosted|/work/|/tmp/lab|issue #?\d", line, re.I), line


def overview() -> None:
    """Each section's size and what it uses, and all that is against the order: for whoever moves things."""
    where = {name: section(line) for name, line in DEFINED.items()}
    used = Counter((here, where[name]) for here, _, _, name in uses())
    for name, size in sizes().items():
        lengths = [length(node) for node in functions() if section(node.lineno) == name] or [0]
        over = "  OVER 900" if size > 900 else ""
        print(f"{name}: {size} lines, {len(lengths)} functions, median {statistics.median(lengths):g}{over}")
        others = [f"{to} {count}" for (here, to), count in used.most_common() if here == name != to != ""]
        print("    uses", ", ".join(others) or "no other")
    print(f"\nmedian of all functions: {statistics.median(map(length, functions())):g}")
    print(*(f"{node.name}: {length(node)} lines" for node in functions() if length(node) > 60), sep="\n")
    print(*uses_of_sections_below(), sep="\n")
    print(*(f"{name} isn't in the list at the top" for name in ORDER if name not in dict(contents())), sep="\n")


if __name__ == "__main__":
    overview()
