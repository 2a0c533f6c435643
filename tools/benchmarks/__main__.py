"""The command line of the benchmarks: which ones, how long, how large, and where results go.

Results are printed. With `--output` they go to `results.json`, `results.md` and `results.svg` there too; what other
benchmarks left in that `results.json` stays, so that they may be run one after the other.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
import msgspec

from asrfs.errors import BadInputError
from asrfs.model.quantities import parse_size

from . import barrier, blocks, database, export, failover, recover, replicate, resync, scale
from .benchmark import PEERS, Run
from .chart import chart
from .page import CHART, lines_of, page
from .results import Outcome, document, outcome_of
from .workbench import TOLD_FAILURES, Options, Workbench

ALONE: dict[str, Callable[[Workbench, str, str], Run]] = {
    "database": database.run,
    "replicate": replicate.run,
    "recover": recover.run,
    "scale": scale.run,
    "export": export.run,
    "barrier": barrier.run,
    "resync": resync.run,
    "failover": failover.run,
}
BENCHMARKS = (*blocks.JOBS, *ALONE)
TINY = {"turns": 1, "seconds": 0.1, "size": "16M", "records": 20_000, "backlog": "4M", "image": "32M"}
DOCUMENT, PAGE = "results.json", "results.md"
_UNREPEATED = ("--output", "--scratch", "--no-install")


class Size(click.ParamType[int]):
    """Bytes, written as 1G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(value)
        except BadInputError as error:
            self.fail(str(error), param, ctx)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers, written as 1,2,4."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if not all(part.isdigit() and int(part) for part in parts):
            self.fail(f"{value!r} is not a list of numbers like 1,2,4", param, ctx)
        return tuple(sorted(set(map(int, parts))))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="BENCHMARK…", nargs=-1, required=True, type=click.Choice([*BENCHMARKS, "all"]))
@click.option("--turns", type=click.IntRange(1), default=5, show_default=True, help="How often each peer has its turn.")
@click.option("--seconds", type=click.FloatRange(0.1), help="Of each measurement; the default is each benchmark's own.")
@click.option("--size", type=Size(), default="1G", show_default=True, help="Of the disk, where it is not the point.")
@click.option("--peers", help=f"Only these, as a,b,c: {', '.join(PEERS)}.")
@click.option("--output", type=click.Path(path_type=Path), help="Directory for results.json, results.md, results.svg.")
@click.option("--scratch", type=click.Path(exists=True, path_type=Path), help="Where everything is made; else /tmp.")
@click.option("--tiny", is_flag=True, help="Only to see that it works: everything small and once.")
@click.option("--no-install", is_flag=True, help="Install no Debian packages; peers that lack theirs are left out.")
@click.option("--rates", type=Numbers(), default=(), help="replicate: MB/s to try, as 100,200,300.")
@click.option("--machines", type=Numbers(), default=(), help="scale, barrier: how many, as 1,2,4.")
@click.option("--records", type=click.IntRange(1000), default=10_000_000, show_default=True, help="export: of history.")
@click.option("--backlog", type=Size(), default="1G", show_default=True, help="recover: bytes of unapplied writes.")
@click.option("--image", type=Size(), default="4G", show_default=True, help="resync: bytes of the disk compared.")
@click.pass_context
def main(
    context: click.Context, /, names: tuple[str, ...], peers: str | None, output: Path | None, **given: Any
) -> None:
    """Run benchmarks of asrfs beside its peers on this machine, in turns: write read mixed fsync database replicate
    recover scale export barrier resync failover, or all.
    """
    if os.geteuid() != 0:
        raise click.UsageError("loop devices need root")
    options = _options(context, peers, given)
    chosen = BENCHMARKS if "all" in names else names
    _undo_before_ending()
    try:
        for run in _runs(options, [name for name in BENCHMARKS if name in chosen]):
            print("\n".join([*lines_of(run.outcome), ""]), flush=True)
            if output is not None:
                write(output, run.outcome)
    except TOLD_FAILURES as error:
        raise click.ClickException(" ".join(str(error).split())) from None


def _runs(options: Options, names: list[str]) -> Iterator[Run]:
    """The benchmarks one after the other, each group that shares peers with a scratch directory of its own."""
    on_blocks = {name: _command(name) for name in names if name in blocks.JOBS}
    if on_blocks:
        with Workbench(options) as bench:
            yield from blocks.runs(bench, on_blocks)
    for name in names:
        if name in ALONE:
            with Workbench(options) as bench:
                run = ALONE[name](bench, name, _command(name))
            yield run


def write(directory: Path, outcome: Outcome) -> None:
    """Put an outcome beside those of other benchmarks, and draw all of them anew."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / DOCUMENT
    outcomes = {each.benchmark: each for each in _read(path)} | {outcome.benchmark: outcome}
    ordered = [outcomes[name] for name in BENCHMARKS if name in outcomes]
    whole = {"benchmarks": [document(each) for each in ordered]}
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    (directory / PAGE).write_text(page(ordered))
    (directory / CHART).write_text(chart(ordered))


def _read(path: Path) -> Iterable[Outcome]:
    if not path.exists():
        return []
    try:
        return [outcome_of(each) for each in json.loads(path.read_text())["benchmarks"]]
    except (ValueError, KeyError, TypeError, msgspec.ValidationError) as error:
        raise click.ClickException(f"{path} is not ours, or of another version ({error}): move it away") from None


def _options(context: click.Context, peers: str | None, given: dict[str, Any]) -> Options:
    chosen = tuple(filter(None, (peers or "").split(",")))
    if unknown := set(chosen) - set(PEERS):
        raise click.UsageError(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if given["tiny"]:
        for name, value in TINY.items():
            if context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
                given[name] = Size().convert(value, None, context) if isinstance(value, str) else value
    return Options(
        turns=given["turns"],
        seconds=given["seconds"],
        size_bytes=given["size"],
        peers=chosen,
        tiny=given["tiny"],
        may_install=not given["no_install"],
        scratch=given["scratch"],
        rates=given["rates"],
        machines=given["machines"],
        records=given["records"],
        backlog_bytes=given["backlog"],
        image_bytes=given["image"],
    )


def _command(name: str) -> str:
    """What runs this benchmark again: the options as they were given, but not where things were put."""
    words: list[str] = []
    rest = iter(sys.argv[1:])
    for word in rest:
        if word in ("--output", "--scratch"):
            next(rest, None)
        elif not word.startswith(_UNREPEATED) and word not in (*BENCHMARKS, "all"):
            words.append(word)
    return shlex.join(["tools/bench", name, *words])


def _undo_before_ending() -> None:
    """SIGINT and SIGTERM end the run once; what they interrupt is undone, and a second one does not disturb that."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


if __name__ == "__main__":
    main(prog_name="tools/bench")
