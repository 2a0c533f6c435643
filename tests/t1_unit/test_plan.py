"""Recovery plans: what is taken, what is refused, and what a dry run says of a site."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from asrfs.errors import BadInputError
from asrfs.model.boot import BootSettings, Filesystem, Health, MountBoot, QemuBoot
from replica_store.failover.plan import Kind, Plan, read_plan
from replica_store.failover.plan_dry_run import MachineFacts, SiteFacts, findings, programs_of

EXAMPLE = Path(__file__).parents[2] / "docs/plan.example.toml"


def groups(*said: str, head: str = 'name = "p"') -> str:
    return head + "".join(f"\n[[groups]]\n{each}" for each in said)


def one(name: str, more: str = "") -> str:
    return f'name = "{name}"\nmachines = [{{ name = "m-{name}" }}]\n{more}'


def test_the_example_of_the_manual() -> None:
    plan = read_plan(EXAMPLE.read_text(), "plan.example.toml")
    assert plan.predecessors() == {
        "network": (),
        "databases": ("network",),
        "caches": ("network",),
        "web": ("databases", "caches"),
        "statistics": ("databases",),
    }
    assert [machine.name for machine in plan.machines() if not machine.critical] == ["reports", "cache1", "statistics1"]
    assert programs_of(plan) == [
        "/usr/local/sbin/announce",
        "/usr/local/sbin/move-address",
        "/usr/local/sbin/open-shop",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "name"),
        ('name = "p"\ngroups = []', "groups"),
        (groups('name = "a"'), "1 to 1000 machines"),
        (groups(one("a"), head='name = "../p"'), "name of a plan"),
        (groups(one("a"), head='name = "p"\npoint = ""'), "selector"),
        (groups(one("a"), head='name = "p"\nspeed = 3'), "speed"),
        (groups(one("a", "critcal = false")), "critcal"),
        (groups(one("a"), one("a")), "group a is there twice"),
        (groups(one("a"), 'name = "b"\nmachines = [{ name = "m-a" }]'), "machine m-a is there twice"),
        (groups(one("a", 'after = ["b"]')), "'b', which the plan does not have"),
        (groups(one("a", 'unless_failed = ["b"]')), "'b', which the plan does not have"),
        (groups(one("a", 'after = ["a"]')), "a → a"),
        (groups(one("a", 'after = ["c"]'), one("b"), one("c")), "wait for each other: (a|b|c) → (a|b|c) → (a|b|c)"),
        (groups(one("a"), one("b", 'after = []\nunless_failed = ["a"]')), "does not come after it"),
        (groups('name = "a"\nmachines = [{ name = "m", timeout = "0s" }]'), "timeout"),
        (groups('name = "a"\nmachines = [{ name = "m", timeout = "soon" }]'), "not a duration"),
        (groups('name = "a"\nmachines = [{ name = "m", when = ["now"] }]'), "now"),
        (groups(one("a", 'pre = [{ name = "x", command = ["x"] }]')), "absolute path"),
        (groups(one("a", 'pre = [{ name = "x", command = [] }]')), "command"),
        (groups(one("a", 'post = [{ name = "x", command = ["/x"] }, { name = "x", command = ["/y"] }]')), "twice"),
        (groups(one("a", "pause_before = { text = '' }")), "text"),
        ("#" * (300 << 10), "at most"),
        ("[[groups", "f"),
    ],
)
def test_what_no_site_could_carry_out_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words) as caught:
        read_plan(text, "f")
    assert str(caught.value).startswith("f: ")


def test_a_cycle_is_named_in_the_order_in_which_they_wait() -> None:
    text = groups(one("a", 'after = ["c"]'), one("b", 'after = ["a"]'), one("c", 'after = ["b"]'), one("d"))
    with pytest.raises(BadInputError, match=r"each other: (a → b → c → a|b → c → a → b|c → a → b → c)"):
        read_plan(text, "f")


# ---- dry run --------------------------------------------------------------------------------------------------------

GOOD = MachineFacts(disks=("root", "data"), bytes_needed=10)
MOUNT = BootSettings(
    kind="mount",
    mount=MountBoot(filesystems=(Filesystem(disk="data", path="/srv"),)),
    health=Health(port=5432),
)
PLAN = read_plan(
    groups(
        'name = "a"\nmachines = [{ name = "m1" }, { name = "m2", critical = false }]\n'
        'pre = [{ name = "s", command = ["/bin/s"] }]',
        'name = "b"\nmachines = [{ name = "m3", when = ["planned"] }]',
    ),
    "f",
)
SITE = SiteFacts({"m1": GOOD, "m2": GOOD, "m3": GOOD}, 30, {"/bin/s": True})


def said(plan: Plan = PLAN, kind: Kind = "planned", **changes: object) -> list[tuple[str, str, str]]:
    return [tuple(each) for each in findings(plan, kind, replace(SITE, **changes))]  # type: ignore[arg-type]


def with_facts(name: str, **changes: object) -> dict[str, MachineFacts]:
    return {**SITE.machines, name: replace(GOOD, **changes)}  # type: ignore[arg-type]


def test_a_site_where_all_is_well() -> None:
    assert said() == []
    assert said(bytes_free=20, kind="test") == [], "what is not meant needs no space"


def test_what_stands_in_the_way_is_named_and_weighed() -> None:
    assert said(bytes_free=29) == [
        ("error", "p", "all disks need 30 B once they are whole, and 29 B are free"),
    ]
    assert said(programs={}) == [("error", "a/s", "/bin/s is not a program that can be run here")]
    assert said(machines={"m1": GOOD, "m2": GOOD}) == [("error", "m3", "this vault has no such machine")]
    assert said(machines={"m1": GOOD, "m2": GOOD}, kind="test") == []
    assert said(machines=with_facts("m2", no_point="no point is listed")) == [("warning", "m2", "no point is listed")]
    assert said(machines=with_facts("m1", refused="it is committed")) == [("error", "m1", "it is committed")]
    assert said(machines=with_facts("m1", disks=())) == [("error", "m1", "it has no disk at that point")]
    flagged = with_facts("m1", warnings=("verification found damage",))
    assert said(machines=flagged) == [("warning", "m1", "verification found damage")]
    boot = BootSettings(kind="qemu", qemu=QemuBoot(disks=("gone",)))
    assert said(machines=with_facts("m1", boot=boot)) == [("error", "m1", "its boot settings name disk 'gone'")]
    only = read_plan(groups('name = "a"\nmachines = [{ name = "m1", when = ["test"] }]'), "f")
    assert said(only) == [("error", "p", "no machine of the plan is meant for planned")]


def test_ports_and_paths_are_had_by_one() -> None:
    both = {**SITE.machines, "m1": replace(GOOD, boot=MOUNT), "m3": replace(GOOD, boot=MOUNT)}
    assert said(machines=both) == [
        ("error", "m3", "port 5432 is taken by machine m1"),
        ("error", "m3", "/srv is taken by machine m1"),
    ]
    alone = with_facts("m1", boot=MOUNT)
    assert said(machines=alone, ports_in_use=frozenset([5432]), paths_in_use=frozenset(["/srv"])) == [
        ("error", "m1", "port 5432 is taken by somebody else"),
        ("error", "m1", "/srv is taken by somebody else"),
    ]
    assert said(machines=alone, paths_in_use=frozenset(["/srv"]), kind="test") == [], "a test has paths of its own"
