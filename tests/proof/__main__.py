"""`tools/prove`: run levels by name, print what they found, write the report."""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import click

import asrfs
from tests import sweep
from tests.proof import report as report_page
from tests.proof.play import Asked, play
from tests.proof.registry import BY_NAME, LEVELS


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
    started = time.monotonic()
    sweep.sweep_dead_runs()
    base = sweep.run_directory(os.getpid())
    base.mkdir(mode=0o700)
    try:
        outcomes = play(chosen, Asked(base, seed, only, cases, minutes, release), jobs)
    finally:
        left = sweep.sweep(base)
    if left:
        print(f"left behind, removed now: {left}")
    about = {
        "version": asrfs.__version__,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "size": "release" if release else "submission",
        "took": f"{time.monotonic() - started:.0f} s by {jobs} processes",
    }
    written = report_page.document(outcomes, about)
    directory = report_to or Path(f"/tmp/asrfs-proof-{os.getpid()}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.md").write_text(report_page.markdown(written))
    (directory / "report.json").write_text(report_page.as_json(written))
    print(report_page.markdown(written))
    print(f"report: {directory}/report.md and report.json")
    sys.exit(0 if written["passed"] and not left else 1)


if __name__ == "__main__":
    prove()
