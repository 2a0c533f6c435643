"""`freezes`: filesystem points in a row, ext4 and xfs under load at once; each is exported and must need no replay.

A case is one machine with a filesystem of each kind. Every point says that it is filesystem-consistent and how long it
held; every export of it is clean as it lies there, with nothing to replay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tests.proof.kernel.churn import check_clean, churn
from tests.proof.kernel.filesystems import open_filesystem
from tests.proof.kernel.world import World, world
from tests.proof.level import Case, Context, Level, Notes

POINTS_A_CASE = 5
KINDS = ("ext4", "xfs")


def run_case(made: World, seed: int, points: int, notes: Notes) -> None:
    where = {kind: made.root / f"fs-{kind}" for kind in KINDS}
    for kind, directory in where.items():
        directory.mkdir()
        open_filesystem(made, kind, kind, directory)
    ids = []
    with churn(where["ext4"], seed), churn(where["xfs"], seed + 10):
        for number in range(points):
            point = made.asrfs("point", "create", "--consistency", "filesystem", "--name", f"p{number}")
            assert (point["consistency"], point["failed"]) == ("filesystem", None), point
            assert 0 < point["freeze_ms"] <= point["hold_ms"], point
            ids.append(point["id"])
    made.drained()
    listed = {point["id"]: point for point in made.store.ask("point", "list", made.host.name)}
    for number, point_id in enumerate(ids):
        assert listed[point_id]["consistency"] == "filesystem" and listed[point_id]["hold_ms"] > 0, listed[point_id]
        for kind, image in zip(KINDS, made.export(point_id, f"p{number}"), strict=True):
            assert check_clean(image, kind, made.root / "look") > 0
            image.unlink()
            notes.fired(kind)
        notes.count()


def _cases(context: Context) -> Iterator[Case]:
    for number in itertools.count(1):

        def run(notes: Notes, number: int = number) -> None:
            with world(context.scratch / f"case-{number}", ext4="200M", xfs="320M") as made:
                run_case(made, context.seed + 100 * number, POINTS_A_CASE, notes)

        yield Case(f"case {number}", run)


LEVEL = Level(name="freezes", unit="points", submission=10, release=200, faults=KINDS, cases=_cases)
