"""The repository keeps its own rules."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest

import asrfs
import replica_store
from tests.t0_tidy import rules

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("asrfs", "replica_store")
NOT_OURS = {".git", ".venv", "__pycache__", "dist"}


def files(*tops: str) -> list[PurePosixPath]:
    """Files below these directories (all, if none is named), relative to the repository, caches left out."""
    found = []
    for top in tops or (".",):
        for directory, names, entries in os.walk(ROOT / top):
            names[:] = sorted(n for n in names if n not in NOT_OURS and not n.endswith(("_cache", ".egg-info")))
            relative = Path(directory).relative_to(ROOT)
            found += [PurePosixPath(relative / entry) for entry in sorted(entries)]
    return [path for path in found if path.parts[0] != ".hypothesis"]


def sources(*tops: str) -> list[tuple[PurePosixPath, str]]:
    return [(path, (ROOT / path).read_text()) for path in files(*tops) if path.suffix == ".py"]


def scripts() -> list[tuple[PurePosixPath, str]]:
    return [(path, (ROOT / path).read_text()) for path in files("tools", ".ci") if not path.suffix]


def documents() -> list[tuple[PurePosixPath, str]]:
    return [(path, (ROOT / path).read_text()) for path in files() if path.suffix == ".md"]


def complain(complaints: list[list[str]]) -> None:
    assert complaints, "the rule was applied to nothing"
    found = [line for lines in complaints for line in lines]
    assert not found, "\n".join(found)


def test_tests_lie_in_a_layer_of_tests_only() -> None:
    complain([rules.test_file_outside_tests(path) + rules.test_file_outside_layers(path) for path in files()])


def test_names_of_modules_say_what_they_hold() -> None:
    complain([rules.forbidden_name(path) for path, _ in sources(*PACKAGES, "tests", "tools")])


def test_files_and_functions_are_short() -> None:
    complain([rules.too_long(path, text) for path, text in sources(*PACKAGES)])


def test_every_module_opens_with_a_docstring() -> None:
    complain([rules.without_docstring(path, text) for path, text in sources(*PACKAGES, "tests", "tools")])


def test_nothing_is_unfinished_or_skipped() -> None:
    complain([rules.unfinished(path, text) for path, text in sources(*PACKAGES, "tests", "tools") + scripts()])


def test_no_path_of_one_machine() -> None:
    texts = sources(*PACKAGES, "tests", "tools") + scripts() + documents()
    texts.append((PurePosixPath("pyproject.toml"), (ROOT / "pyproject.toml").read_text()))
    complain([rules.developer_path(path, text, str(ROOT)) for path, text in texts])


def test_tests_do_not_wait_by_the_clock() -> None:
    complain([rules.unexplained_sleep(path, text) for path, text in sources("tests")])


@pytest.mark.parametrize("room", rules.PURE_ROOMS)
def test_pure_rooms_do_no_io(room: str) -> None:
    complain([rules.impure(path, text) for path, text in sources(room)])


def test_store_imports_the_shared_floor_only() -> None:
    complain([rules.off_the_floor(path, text) for path, text in sources("replica_store")])


def test_host_never_imports_the_store() -> None:
    complain([rules.up_to_store(path, text) for path, text in sources("asrfs")])


@pytest.mark.parametrize("package", PACKAGES)
def test_readme_maps_the_rooms_that_exist(package: str) -> None:
    rooms = [path.parent.name for path in (ROOT / package).glob("*/__init__.py")]
    complain([rules.unmapped_rooms(package, (ROOT / package / "README.md").read_text(), rooms)])


@pytest.mark.parametrize("package", PACKAGES)
def test_directories_of_a_package_are_packages(package: str) -> None:
    directories = {path.parent for path, _ in sources(package)}
    assert directories
    assert [str(d) for d in directories if not (ROOT / d / "__init__.py").exists()] == []


def test_links_between_documents_lead_somewhere() -> None:
    existing = [str(path) for path in files()]
    complain([rules.broken_links(path, text, existing) for path, text in documents()])


def test_scripts_run_and_stop_at_errors() -> None:
    complain([rules.unsafe_script(path, text, os.access(ROOT / path, os.X_OK)) for path, text in scripts()])


def test_shell_scripts_parse() -> None:
    shells = [ROOT / path for path, text in scripts() if "bash" in text.partition("\n")[0]]
    assert {"setup", "check", "test", "run"} <= {path.name for path in shells}
    for shell in shells:
        parsed = subprocess.run(["bash", "-n", shell], capture_output=True, text=True, timeout=10, check=False)
        assert parsed.returncode == 0, parsed.stderr


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert asrfs.__version__ == replica_store.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == asrfs.__version__, "the changelog does not begin with this version"


def test_contracts_and_rules_name_the_same_pure_rooms_and_modules() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    pure = next(contract for contract in contracts if contract["id"] == "pure-rooms")
    assert pure["source_modules"] == [room.replace("/", ".") for room in rules.PURE_ROOMS]
    assert set(pure["forbidden_modules"]) == rules.IMPURE_MODULES


def test_every_requirement_is_used() -> None:
    """A library that nothing imports is weight and risk."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [re.split(r"[^\w-]", requirement)[0] for requirement in required]
    assert len(names) > 5
    text = "\n".join(source for _, source in sources(*PACKAGES))
    assert [n for n in names if not re.search(rf"^\s*(?:import|from) {n}\b", text, re.MULTILINE)] == []


def test_tests_that_the_page_on_healing_names_are_there() -> None:
    """A name without a layer is of the layer of its column."""
    missing = []
    rows = [line.split("|")[1:4] for line in (ROOT / "docs/healing.md").read_text().splitlines() if "`test_" in line]
    for row in rows:
        for layer, cell in zip(("", "t4_sim", "t5_system"), row, strict=True):
            for file, test in re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", cell):
                path = ROOT / "tests" / (file if "/" in file else f"{layer}/{file}")
                if not path.is_file() or (test and f"def {test}(" not in path.read_text()):
                    missing.append(f"{file}::{test}")
    assert rows and not missing
