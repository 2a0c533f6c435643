"""`tools/prove`: run levels by name, print what they found, write the report."""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import click

import asrfs
from tests import sweep
from tests.proof import report as report_page
from tests.proof.level import Level
from tests.proof.play import Asked, play
from tests.proof.registry import BY_NAME, LEVELS
from tests.proof.run import Outcome


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[LEVEL]…")
@click.option("--seed", type=int, help="Play an earlier run again.")
@click.option("--case", "only", metavar="LABEL", help="Only this case of one level.")
@click.option("--cases", type=click.IntRange(1), help="So many of each level, instead of its own number.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="At most so long for each level.")
@click.option("--release", is_flag=True, help="The large run, before a release.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default=True,
    help="So many processes: levels at a time, or parts of one.",
)
@click.option("--report", "report_to", type=click.Path(path_type=Path), help="Directory for report.md and report.json.")
@click.option("--list", "is_list", is_flag=True, help="Name the levels and their sizes.")
def prove(
    names: tuple[str, ...],
    seed: int | None,
    only: str | None,
    cases: int | None,
    minutes: float | None,
    release: bool,
    jobs: int,
    report_to: Path | None,
    is_list: bool,
) -> None:
    """Break the product on purpose and check what must hold. Without LEVEL: all of them."""
    if unknown := [name for name in names if name not in BY_NAME]:
        raise click.UsageError(f"there is no level {unknown[0]}: choose from {', '.join(BY_NAME)}")
    chosen = [BY_NAME[name] for name in names] or list(LEVELS)
    if is_list:
        for level in chosen:
            print(f"{level.name:12} {level.submission:>8,} {level.unit} a submission, {level.release:,} a release")
        return
    if only is not None and (len(chosen) != 1 or seed is None):
        raise click.UsageError("--case plays one case of one level again: name the level and give --seed")
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"seed {seed}", flush=True)
    sweep.sweep_dead_runs()
    base = sweep.run_directory(os.getpid())
    base.mkdir(mode=0o700)
    report = Report(report_to or Path(f"/tmp/asrfs-proof-{os.getpid()}"), chosen, jobs, release)
    report.write()
    try:
        with closing(play(chosen, Asked(base, seed, only, cases, minutes, release), jobs)) as outcomes:
            for outcome in outcomes:
                report.add(outcome)
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        left = sweep.sweep(base)
    if left:
        print(f"left behind, removed now: {left}")
    report.write()
    print(report.page)
    print(f"report: {report.directory}/report.md and report.json")
    sys.exit(0 if report.passed and not left else 1)


class Report:
    """The report as it lies in its directory, written anew whenever a level has ended: a run may be stopped."""

    def __init__(self, directory: Path, levels: Sequence[Level], jobs: int, is_release: bool) -> None:
        self.directory = directory
        self.page = ""
        self.passed = False
        self._levels = levels
        self._outcomes: dict[str, Outcome] = {}
        self._jobs = jobs
        self._size = "release" if is_release else "submission"
        self._started = time.monotonic()
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, outcome: Outcome) -> None:
        self._outcomes[outcome.level.name] = outcome
        self.write()

    def write(self) -> None:
        about = {
            "version": asrfs.__version__,
            "kernel": platform.release(),
            "python": platform.python_version(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "size": self._size,
            "took": f"{time.monotonic() - self._started:.0f} s by {self._jobs} processes",
        }
        ended = [self._outcomes[level.name] for level in self._levels if level.name in self._outcomes]
        unended = [level.name for level in self._levels if level.name not in self._outcomes]
        written = report_page.document(ended, about, unended)
        self.passed, self.page = written["passed"], report_page.markdown(written)
        (self.directory / "report.md").write_text(self.page)
        (self.directory / "report.json").write_text(report_page.as_json(written))


if __name__ == "__main__":
    prove()
