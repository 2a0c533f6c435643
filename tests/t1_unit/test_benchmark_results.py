"""What benchmarks say of their measurements: medians, ratios, figures, and the page, document and picture of them."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from tools.benchmarks.chart import chart
from tools.benchmarks.figures import judge
from tools.benchmarks.page import lines_of, page
from tools.benchmarks.results import (
    Outcome,
    PeerFacts,
    Spread,
    Turn,
    Workload,
    also,
    columns_of,
    document,
    number,
    outcome_of,
    percentile,
    ratio,
    spread,
    spread_of,
)

TITLE = "4 KiB <random> write & more | depth 16"


def workload(**turns: list[float]) -> Workload:
    found = Workload("random-write", TITLE, "operations/s", "passthrough")
    for peer, values in turns.items():
        for value in values:
            found.add(peer.replace("_", "-"), Turn(value, {"p99_us": value / 10}))
    return found


def outcome() -> Outcome:
    """One where a peer is missing and another one shipped."""
    peers = {
        "raw": PeerFacts("raw file"),
        "passthrough": PeerFacts("C pass-through", "libfuse3-dev 3.14.0"),
        "qemu": PeerFacts("QEMU FUSE export"),
        "nbdkit": PeerFacts("nbdkit + nbdfuse", unavailable="not installed: libnbd-bin"),
        "asrfs-shipping": PeerFacts("asrfs, shipping", resident_bytes_max={"disk server": 100 << 20, "agent": 1 << 30}),
    }
    return Outcome(
        benchmark="write",
        when="2026-11-21 10:00 UTC",
        command="tools/bench write",
        machine={"processor": "2 × Example", "kernel": "Linux 6.9"},
        settings={"turns": "3"},
        peers=peers,
        workloads=[
            workload(raw=[100, 300, 200], passthrough=[400, 400, 400], qemu=[150, 100], asrfs_shipping=[380, 100, 300])
        ],
        notes=["How it was measured."],
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], Spread(3, 3, 3)), ([5.0, 1.0, 2.0], Spread(2, 1, 5)), ([4.0, 1.0, 3.0, 2.0], Spread(2.5, 1, 4))],
)
def test_median_and_range(values: list[float], expected: Spread) -> None:
    assert spread(values) == expected


def test_ratios_are_of_medians() -> None:
    found = workload(raw=[100, 300, 200], passthrough=[400, 500, 100])
    assert ratio(found, "raw", "passthrough") == 0.5
    assert ratio(found, "passthrough", "raw") == 2
    assert ratio(found, "raw", "qemu") is None
    assert ratio(workload(raw=[1], qemu=[0]), "raw", "qemu") is None
    assert spread_of(found, "qemu") is None


def test_what_is_measured_beside() -> None:
    found = workload(raw=[100, 300, 200])
    found.add("qemu", Turn(1.0, {"cpu_ms": 7.0, "p99_us": 1.0}))
    assert also(found, "raw", "p99_us") == 20
    assert also(found, "raw", "cpu_ms") is None
    assert columns_of(found) == ["p99_us", "cpu_ms"]


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 1), (50, 50), (50.5, 51), (99, 99), (99.1, 100), (100, 100)]
)
def test_percentile(percent: float, expected: float) -> None:
    assert percentile(range(100, 0, -1), percent) == expected


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,346"), (99.96, "100.0"), (12.34, "12.3"), (1.234, "1.23"), (0.0123, "0.012")]
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_document_can_be_read_again_and_says_what_follows() -> None:
    before = outcome()
    found = json.loads(json.dumps(document(before)))
    assert outcome_of(found) == before
    summary = found["workloads"][0]["summary"]
    assert summary["asrfs-shipping"]["median"] == 300
    assert summary["asrfs-shipping"]["ratio_to"] == {"raw": 1.5, "passthrough": 0.75, "qemu": 2.4}
    assert found["peers"]["nbdkit"]["unavailable"]


def test_figures_are_judged_where_something_was_measured() -> None:
    judged = {(each.what.rpartition(": ")[2], each.wanted): each for each in judge([outcome()])}
    assert judged["asrfs, shipping", "≥ 1.5 × QEMU FUSE export"].reached
    assert not judged["asrfs, shipping", "≥ 0.8 × C pass-through"].reached
    assert judged["disk server", "≤ 150 MiB"].reached
    assert not judged["agent", "≤ 300 MiB"].reached
    assert len(judged) == 4, "nothing is said of what was not measured"


def test_lines_for_the_terminal() -> None:
    lines = "\n".join(lines_of(outcome()))
    for words in (TITLE, "raw file", "300", "100 to 380", "0.75", "not available: not installed: libnbd-bin"):
        assert words in lines
    rows = [line for line in lines.splitlines() if line.startswith("  ") and "to" in line]
    assert len({len(row) for row in rows}) == 1, "columns stand under each other"


def test_page_holds_tables_command_machine_and_notes() -> None:
    text = page([outcome()])
    assert "    tools/bench write\n" in text
    assert "- processor: 2 × Example" in text
    assert "- C pass-through: libfuse3-dev 3.14.0" in text
    assert "- How it was measured." in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == (2 + 4) + (2 + 4)
    assert len({line.count("|") for line in tables[-6:]}) == 1


def test_chart_is_well_formed_and_has_a_bar_for_each_that_was_measured() -> None:
    root = ElementTree.fromstring(chart([outcome()]))
    names = {"svg": "http://www.w3.org/2000/svg"}
    words = [text.text or "" for text in root.findall("svg:text", names)]
    assert any(TITLE in each for each in words)
    assert "asrfs, shipping" in words
    assert "300  (0.75 × C pass-through)" in words
    bars = root.findall("svg:rect", names)[1:]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert len(widths) == 4
    assert widths[3] == pytest.approx(widths[1] * 0.75, abs=0.1)


def test_chart_of_nothing_is_a_picture_too() -> None:
    empty = outcome()
    empty.workloads = [Workload("random-write", TITLE, "operations/s", "passthrough")]
    for outcomes in ([], [empty]):
        assert ElementTree.fromstring(chart(outcomes)).tag.endswith("svg")
