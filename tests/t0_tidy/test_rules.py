"""Each rule complains of what it forbids and lets pass what it allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

import pytest

from tests.t0_tidy import rules

MODULE = PurePosixPath("asrfs/model/thing.py")
UNFINISHED = "TO" + "DO"
SKIP = "pytest." + "skip"

Rule = Callable[[PurePosixPath, str], list[str]]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("tests/t1_unit/test_x.py", True),
        ("asrfs/model/testing.py", True),
        ("asrfs/model/test_x.py", False),
        ("tools/x_test.py", False),
        ("test_x.py", False),
    ],
)
def test_tests_outside_tests(path: str, allowed: bool) -> None:
    assert (rules.test_file_outside_tests(PurePosixPath(path)) == []) is allowed


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("tests/t4_sim/test_x.py", True),
        ("tests/t1_unit/journal/test_x.py", True),
        ("tests/fakes/clock.py", True),
        ("tests/test_x.py", False),
        ("tests/fakes/test_x.py", False),
        ("tests/t7_more/test_x.py", False),
    ],
)
def test_tests_outside_layers(path: str, allowed: bool) -> None:
    assert (rules.test_file_outside_layers(PurePosixPath(path)) == []) is allowed


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("asrfs/journal/recovery.py", True),
        ("asrfs/journal/data_keys.py", True),
        ("asrfs/journal/utils.py", False),
        ("asrfs/common/recovery.py", False),
        ("tests/fakes/helpers.py", False),
        ("replica_store/vault/manager.py", False),
    ],
)
def test_names_that_say_nothing(path: str, allowed: bool) -> None:
    assert (rules.forbidden_name(PurePosixPath(path)) == []) is allowed


def _function_of(lines: int) -> str:
    return "\n".join(["async def f():", *["    pass"] * (lines - 1)])


def test_length_of_files_and_functions() -> None:
    assert rules.too_long(MODULE, "x = 1\n" * rules.FILE_LINES_MAX) == []
    assert len(rules.too_long(MODULE, "x = 1\n" * (rules.FILE_LINES_MAX + 1))) == 1
    assert rules.too_long(MODULE, _function_of(rules.FUNCTION_LINES_MAX)) == []
    (complaint,) = rules.too_long(MODULE, _function_of(rules.FUNCTION_LINES_MAX + 1))
    assert str(rules.FUNCTION_LINES_MAX + 1) in complaint
    method = "class A:\n" + "\n".join("    " + line for line in _function_of(rules.FUNCTION_LINES_MAX + 1).splitlines())
    assert len(rules.too_long(MODULE, method)) == 1


def test_docstrings() -> None:
    assert rules.without_docstring(MODULE, '"""What lives here."""\n') == []
    for bad in ("", "x = 1\n", "# a comment\n", '"""   """\n', 'x = 1\n"""Too late."""\n'):
        assert len(rules.without_docstring(MODULE, bad)) == 1, bad


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("# all to do with disks: todos are none", True),
        ("skipped = count(skip)", True),
        (f"# {UNFINISHED}: later", False),
        ("# FIX" + "ME", False),
        ("raise NotImplemented" + "Error", False),
        (f"    {SKIP}('no root')", False),
        ("@pytest.mark." + "skipif(True)", False),
        ("@pytest.mark.xf" + "ail", False),
        ("pytest.importor" + "skip('x')", False),
    ],
)
def test_unfinished_and_skipped(line: str, allowed: bool) -> None:
    complaints = rules.unfinished(MODULE, f"first\n{line}\nlast\n")
    assert (complaints == []) is allowed
    assert all(":2:" in complaint for complaint in complaints)


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("/var/lib/asrfs and /usr/home", True),
        ("https://example.org/home/page", True),
        ("/srv/checkout-of-another", True),
        ("--state /ho" + "me/ann/x", False),
        ("'/Us" + "ers/ann'", False),
        ("cd /ro" + "ot/x", False),
        ("python /srv/checkout/tools/x", False),
    ],
)
def test_paths_of_one_machine(line: str, allowed: bool) -> None:
    assert (rules.developer_path(MODULE, line, "/srv/checkout") == []) is allowed


def test_a_checkout_at_the_top_is_no_pattern() -> None:
    assert rules.developer_path(MODULE, "see /build/log", "/build") == []


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("import time\ntime.monotonic()", True),
        ("import time\ntime.sleep(1)  # sleep: the kernel polls once a second", True),
        ("async def f(trio):\n    await trio.sleep_forever()", True),
        ("def sleep(s): ...\nsleep(1)", True),
        ("import time\ntime.sleep(1)", False),
        ("import time\ntime.sleep(1)  # sleep:", False),
        ("import time as t\nt.sleep(1)", False),
        ("from time import sleep as rest\nrest(1)", False),
        ("import trio\nasync def f():\n    await trio.sleep(\n        1\n    )", False),
    ],
)
def test_sleeping(source: str, allowed: bool) -> None:
    assert (rules.unexplained_sleep(MODULE, source) == []) is allowed


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("import struct\nfrom datetime import UTC, datetime\ndatetime.fromisoformat('2026-01-01')", True),
        ("from asrfs.model.names import check_name\ndef reopen(): ...\nreopen()", True),
        ("import os", False),
        ("import os.path", False),
        ("def f():\n    from time import monotonic", False),
        ("from os import urandom", False),
        ("open('x')", False),
        ("from datetime import datetime\ndatetime.now()", False),
        ("import uuid\nuuid.uuid4()", False),
        ("print(1)", False),
    ],
)
def test_purity(source: str, allowed: bool) -> None:
    assert (rules.impure(MODULE, source) == []) is allowed


@pytest.mark.parametrize(
    ("path", "source", "allowed"),
    [
        ("replica_store/vault/keys.py", "from asrfs.format.log_object import ObjectHeader", True),
        ("replica_store/vault/keys.py", "import replica_store.vault.catalog", True),
        ("replica_store/__init__.py", "from asrfs import __version__", True),
        ("replica_store/points/tree.py", "from asrfs.fuse.tree import Tree", True),
        ("replica_store/vault/keys.py", "from asrfs.fuse.tree import Tree", False),
        ("replica_store/vault/keys.py", "from asrfs import journal", False),
        ("replica_store/cli/main.py", "def f():\n    import asrfs.cli.main", False),
        ("replica_store/points/tree.py", "from asrfs.daemon import control", False),
    ],
)
def test_the_floor_under_the_store(path: str, source: str, allowed: bool) -> None:
    assert (rules.off_the_floor(PurePosixPath(path), source) == []) is allowed


def test_the_host_knows_no_store() -> None:
    assert rules.up_to_store(MODULE, "import asrfs.disk") == []
    assert len(rules.up_to_store(MODULE, "from replica_store.vault import keys")) == 1
    assert len(rules.up_to_store(MODULE, "def f():\n    import replica_store")) == 1


def test_map_of_rooms() -> None:
    readme = "| room | for |\n|---|---|\n| `disk/` | x |\n| `fuse/` | y |\n"
    assert rules.unmapped_rooms("asrfs", readme, ["disk", "fuse"]) == []
    (missing,) = rules.unmapped_rooms("asrfs", readme, ["disk", "fuse", "journal"])
    assert "journal/" in missing
    (gone,) = rules.unmapped_rooms("asrfs", readme, ["disk"])
    assert "fuse/" in gone


@pytest.mark.parametrize(
    ("link", "allowed"),
    [
        ("[x](b.md)", True),
        ("[x](../LICENSE)", True),
        ("[x](b.md#part) and [y](#here)", True),
        ("[x](https://example.org/a)", True),
        ("[x](c.md)", False),
        ("[x](../../elsewhere/b.md)", False),
    ],
)
def test_links(link: str, allowed: bool) -> None:
    assert (
        rules.broken_links(PurePosixPath("docs/a.md"), link, ["docs/a.md", "docs/b.md", "LICENSE"]) == []
    ) is allowed


def test_scripts() -> None:
    path, good = PurePosixPath("tools/x"), "#!/usr/bin/env bash\n# What it does.\nset -euo pipefail\nls\n"
    assert rules.unsafe_script(path, good, executable=True) == []
    assert rules.unsafe_script(path, "#!/usr/bin/env python3\nx = 1\n", executable=True) == []
    assert len(rules.unsafe_script(path, good, executable=False)) == 1
    assert len(rules.unsafe_script(path, good.replace("pipefail", ""), executable=True)) == 1
    assert len(rules.unsafe_script(path, "ls\n", executable=True)) == 1
