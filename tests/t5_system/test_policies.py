"""Policies on real programs: set at the store, followed by a host, with the store away, after SIGKILL, overridden."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until
from tools.lab import Lab, LabError, command


@pytest.fixture
def lab(scratch: Path) -> Iterator[Lab]:
    lab = Lab(parent=scratch)
    try:
        lab.start_store()
        lab.asrfs("init", lab.machine)
        lab.asrfs("disk", "add", "root", "--size", "1M")
        lab.enroll()
        lab.start_host()
        wait_until(lambda: lab.status()["link"] == "connected", what="a connection")
        yield lab
    finally:
        lab.close()


def made(lab: Lab) -> int:
    """Points the host has made."""
    return len(lab.asrfs("point", "list"))


def setting(lab: Lab, key: str) -> dict[str, Any]:
    shown: dict[str, Any] = lab.asrfs("settings")[key]
    return shown


def follows(lab: Lab, key: str, text: str) -> None:
    wait_until(lambda: setting(lab, key)["value"] == text, what=f"{key}={text} at the host")


def alarms(lab: Lab) -> set[str]:
    return {alarm["id"] for alarm in lab.status()["alarms"]}


def test_a_policy_makes_points_also_without_its_store_and_gives_way_to_what_is_set_here(lab: Lab) -> None:
    assert lab.asrfs("point", "list") == [], "nothing is made of itself at once"
    lab.replica_store("policy", "set", "gold", "crash_interval=1s", "application_interval=off", "retention=48h")
    lab.replica_store("policy", "assign", "gold", lab.machine)
    follows(lab, "crash_interval", "1s")
    assert setting(lab, "crash_interval")["from"] == "policy gold"
    assert setting(lab, "retention") == {
        "value": "48h", "default": "24h", "set": False, "policy": "48h", "from": "policy gold",
    }  # fmt: skip
    assert setting(lab, "point_alarm")["from"] == "default"
    at_store = wait_until(
        lambda: len(points := lab.replica_store("point", "list", lab.machine)) >= 3 and points, what="three points"
    )
    assert {point["consistency"] for point in at_store} == {"crash"}
    (shown,) = (each for each in lab.replica_store("machine", "list") if each["machine"] == lab.machine)
    assert (shown["policy"], shown["policy_by"]) == ("gold", "machine")

    assert shown["alarms"] == []

    lab.kill_store()
    before = made(lab)
    wait_until(lambda: made(lab) >= before + 2, what="points without a store")
    lab.kill("agent")
    before = made(lab)
    wait_until(lambda: made(lab) >= before + 2, what="points of the next agent without a store")
    assert setting(lab, "crash_interval")["from"] == "policy gold"

    lab.asrfs("set", "crash_interval=12h", "point_alarm=1s")
    assert setting(lab, "crash_interval") == {
        "value": "12h", "default": "300s", "set": True, "policy": "1s", "from": "set here",
    }  # fmt: skip
    before = made(lab)
    wait_until(lambda: "no-crash-point" in alarms(lab), what="the alarm of points that do not appear")
    lab.replica_store("policy", "set", "gold", "rpo_warning=1s", "rpo_critical=2s", "point_alarm=1s")
    (shown,) = wait_until(
        lambda: len((found := lab.replica_store("machine", "list"))[0]["alarms"]) == 2 and found,
        seconds_max=60,
        what="both alarms",
    )
    assert [(each["id"], each["severity"]) for each in shown["alarms"]] == [
        ("rpo", "critical"),
        ("no-crash-point", "warning"),
    ]
    assert made(lab) <= before + 1, "one may have been on its way"

    lab.start_store()
    lab.replica_store("policy", "set", "gold", "point_alarm=90m", "rpo_warning=default", "rpo_critical=default")
    lab.asrfs("drain")  # connects now, not when the pause between tries is over
    wait_until(lambda: setting(lab, "point_alarm")["policy"] == "90m", what="a change that the store did alone")
    assert setting(lab, "point_alarm")["from"] == "set here"
    lab.asrfs("set", "crash_interval=default", "point_alarm=default")
    assert setting(lab, "crash_interval")["from"] == "policy gold"
    before = made(lab)
    wait_until(lambda: made(lab) >= before + 2 and "no-crash-point" not in alarms(lab), what="points again")


def test_points_are_chosen_on_both_sides(lab: Lab) -> None:
    for name in ("first", "second", "third"):
        lab.asrfs("point", "create", "--name", name, "--wait")
    moments = [point["time"] for point in lab.asrfs("point", "list")]

    def at_host(*options: str) -> list[str]:
        return [point["name"] for point in lab.asrfs("point", "list", *options)]

    def at_store(*options: str) -> list[str]:
        return [point["name"] for point in lab.replica_store("point", "list", lab.machine, *options)]

    for names in (at_host, at_store):
        assert names() == ["first", "second", "third"]
        assert names("--limit", "2") == ["second", "third"]
        assert names("--name", "second") == ["second"]
        assert names("--since", moments[1]) == ["second", "third"]
        assert names("--until", moments[1]) == ["first", "second"]
        assert names("--since", "1h", "--kind", "crash", "--until", moments[0]) == ["first"]
        assert names("--consistency", "application") == names("--group", "shop") == []
        for wrong in (("--since", "soon"), ("--limit", "0"), ("--group", "../x"), ("--since", "1s", "--until", "1h")):
            with pytest.raises(LabError, match="ended with 2"):
                names(*wrong)


def test_a_policy_that_contradicts_itself_is_refused_in_one_line(lab: Lab) -> None:
    words = ("policy", "set", "gold", "application_interval=24h", "retention=24h", "crash_intreval=5s")
    done = subprocess.run(
        command("replica_store.cli.main", "--vault", lab.vault, *words),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not shorter than retention" in done.stderr and "did you mean crash_interval?" in done.stderr
    with pytest.raises(LabError, match="ended with 3"):
        lab.replica_store("policy", "show", "gold")
