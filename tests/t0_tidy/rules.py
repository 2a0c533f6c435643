"""The rules the repository keeps about itself: each a pure function from what a file says to complaints.

Kept apart from the tests so that each rule is also shown bad input and has to complain. Words that a rule
forbids are put together here from parts, so that this file obeys it too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

FILE_LINES_MAX = 450
FUNCTION_LINES_MAX = 80

# fmt: off
FORBIDDEN_NAMES = frozenset([
    "util", "utils", "helper", "helpers", "common", "manager", "managers", "data", "info", "misc",
    "snapshot", "checkpoint",
])
# fmt: on
PURE_ROOMS = ("asrfs/model", "asrfs/format", "asrfs/protocol")
# fmt: off
IMPURE_MODULES = frozenset([
    "asyncio", "concurrent", "fcntl", "io", "logging", "mmap", "multiprocessing", "os", "pathlib",
    "pyfuse3", "random", "secrets", "select", "shutil", "signal", "socket", "sqlite3", "ssl",
    "structlog", "subprocess", "tempfile", "threading", "time", "trio",
])
# fmt: on
IMPURE_CALLS = frozenset(["open", "print", "input", "uuid1", "uuid4", "now", "utcnow", "today", "urandom"])
SHARED_FLOOR = frozenset(
    ["errors", "model", "format", "protocol", "storage", "transport", "disk", "terminal", "__version__"]
)

_UNFINISHED = re.compile(
    r"\b(?:"
    + "TO"
    + "DO|FIX"
    + r"ME)\b|NotImplemented"
    + r"Error|(?:pytest|unittest|mark)\.skip|importor"
    + "skip|xf"
    + "ail"
)
_DEVELOPER_PATH = re.compile(r"(?<![\w.>])/(?:(?:home|Users)/[A-Za-z]|root/)")
_MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ROOM_ROW = re.compile(r"^\| `(\w+)/` \|", re.MULTILINE)
_SLEEP_REASON = re.compile(r"# sleep: \S+")


def test_file_outside_tests(path: PurePosixPath) -> list[str]:
    """Only `tests/` holds files that look like tests; nothing else collects them."""
    looks_like_test = path.suffix == ".py" and (path.name.startswith("test_") or path.stem.endswith("_test"))
    return (
        [f"{path}: looks like a test but lies outside tests/"] if looks_like_test and path.parts[0] != "tests" else []
    )


def test_file_outside_layers(path: PurePosixPath) -> list[str]:
    """Every test file lies in a layer, else no layer's run would have it."""
    if path.name.startswith("test_") and path.parts[0] == "tests" and not re.fullmatch(r"t[0-6]_\w+", path.parts[1]):
        return [f"{path}: a test file lies in one of tests/t0_… to tests/t6_…"]
    return []


def forbidden_name(path: PurePosixPath) -> list[str]:
    """No module or directory whose name says nothing of what it holds."""
    return [
        f"{path}: {part!r} says nothing of what it holds"
        for part in (*path.parent.parts, path.stem)
        if part in FORBIDDEN_NAMES
    ]


def too_long(path: PurePosixPath, source: str) -> list[str]:
    """Files and functions small enough to be read at once."""
    complaints = []
    if (lines := len(source.splitlines())) > FILE_LINES_MAX:
        complaints.append(f"{path}: {lines} lines, at most {FILE_LINES_MAX}")
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES_MAX:
                complaints.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}")
    return complaints


def without_docstring(path: PurePosixPath, source: str) -> list[str]:
    """Every module opens by saying what lives in it."""
    return (
        [] if (ast.get_docstring(ast.parse(source, str(path))) or "").strip() else [f"{path}: opens with no docstring"]
    )


def unfinished(path: PurePosixPath, text: str) -> list[str]:
    """Nothing half-done and no test that does not run."""
    return [
        f"{path}:{number}: {match[0]!r}"
        for number, line in enumerate(text.splitlines(), 1)
        for match in _UNFINISHED.finditer(line)
    ]


def developer_path(path: PurePosixPath, text: str, checkout: str) -> list[str]:
    """No path that exists on one developer's machine only: homes, and where this checkout happens to lie."""
    place = re.compile(re.escape(checkout) + r"(?![\w-])") if checkout.count("/") >= 2 else None
    return [
        f"{path}:{number}: a path of one machine: {line.strip()[:80]}"
        for number, line in enumerate(text.splitlines(), 1)
        if _DEVELOPER_PATH.search(line) or (place and place.search(line))
    ]


def unexplained_sleep(path: PurePosixPath, source: str) -> list[str]:
    """Tests do not wait by the clock unless the line says why: `# sleep: reason`."""
    lines = source.splitlines()
    tree = ast.parse(source, str(path))
    sleepers = _names_of_sleep(tree)
    complaints = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in sleepers:
            last = node.end_lineno or node.lineno
            if not any(_SLEEP_REASON.search(line) for line in lines[node.lineno - 1 : last]):
                complaints.append(f"{path}:{node.lineno}: sleeps without saying why (`# sleep: reason`)")
    return complaints


def impure(path: PurePosixPath, source: str) -> list[str]:
    """Pure rooms import nothing that does I/O or reads a clock, and call nothing that does."""
    tree = ast.parse(source, str(path))
    complaints = [
        f"{path}:{line}: a pure room imports {module}"
        for line, module in _imports(tree)
        if module.partition(".")[0] in IMPURE_MODULES
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func).rpartition(".")[2] in IMPURE_CALLS:
            complaints.append(f"{path}:{node.lineno}: a pure room calls {_dotted(node.func)}")
    return complaints


def off_the_floor(path: PurePosixPath, source: str) -> list[str]:
    """The store imports the shared floor of the host's package, and in its room `points` `asrfs.fuse` too."""
    allowed = SHARED_FLOOR | {"fuse"} if path.parts[:2] == ("replica_store", "points") else SHARED_FLOOR
    return [
        f"{path}:{line}: imports {module}, which is not on the shared floor"
        for line, module in _imports(ast.parse(source, str(path)))
        if module.startswith("asrfs.") and module.split(".")[1] not in allowed
    ]


def up_to_store(path: PurePosixPath, source: str) -> list[str]:
    """The host never imports the store."""
    return [
        f"{path}:{line}: the host imports {module}"
        for line, module in _imports(ast.parse(source, str(path)))
        if module.partition(".")[0] == "replica_store"
    ]


def unmapped_rooms(package: str, readme: str, rooms: Iterable[str]) -> list[str]:
    """The table of rooms in a package's README and the rooms that exist are the same."""
    listed, present = set(_ROOM_ROW.findall(readme)), set(rooms)
    return [
        *(f"{package}/README.md does not list the room {room}/" for room in sorted(present - listed)),
        *(f"{package}/README.md lists {room}/, which does not exist" for room in sorted(listed - present)),
    ]


def broken_links(path: PurePosixPath, text: str, existing: Iterable[str]) -> list[str]:
    """Links between documents lead to files of this repository."""
    there = set(existing)
    complaints = []
    for target in _MARKDOWN_LINK.findall(text):
        if re.match(r"[a-z]+:|#", target):
            continue
        parts: list[str] = []
        for part in (path.parent / target.partition("#")[0]).parts:
            if part == ".." and parts:
                parts.pop()
            else:
                parts.append(part)
        if "/".join(parts) not in there:
            complaints.append(f"{path}: links to {target}, which is not there")
    return complaints


def unsafe_script(path: PurePosixPath, text: str, executable: bool) -> list[str]:
    """A script can be run, and a shell script stops at its first error."""
    complaints = [] if executable else [f"{path}: is not executable"]
    first = text.partition("\n")[0]
    if not first.startswith("#!/usr/bin/env "):
        complaints.append(f"{path}: does not begin with #!/usr/bin/env …")
    elif "bash" in first and "\nset -euo pipefail\n" not in text:
        complaints.append(f"{path}: lacks `set -euo pipefail`")
    return complaints


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every absolute import, wherever it stands, as line and full name (`from a import b` is a.b)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _names_of_sleep(tree: ast.AST) -> set[str]:
    """What `time.sleep`, `trio.sleep` and their like are called in this module."""
    clocks = ("time", "trio", "anyio", "asyncio")
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {f"{alias.asname or alias.name}.sleep" for alias in node.names if alias.name in clocks}
        elif isinstance(node, ast.ImportFrom) and node.module in clocks:
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "sleep"}
    return names


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
