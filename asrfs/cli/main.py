"""Entry of `asrfs`: collects the verbs, takes global options from anywhere, ends with the right exit code."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import click

import asrfs
from asrfs.cli import attach, disk, drain, enroll, init, inspect, pause, point, serve, settings, status
from asrfs.cli.invocation import Invocation
from asrfs.errors import AsrfsError

STATE_DEFAULT = "/var/lib/asrfs"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(asrfs.__version__, "--version", message="%(version)s")
@click.option("--state", metavar="DIR", help="State directory; else $ASRFS_STATE, else /var/lib/asrfs.")
@click.option("--json", is_flag=True, help="Print one JSON document instead of a table.")
def program(state: str | None, json: bool) -> None:
    """Virtual disks whose every write is journaled here, replicated, and recoverable at any moment.

    --state and --json may stand anywhere on the line.
    """


for verb in (
    init.init,
    disk.disk,
    enroll.enroll,
    serve.serve,
    attach.attach,
    attach.detach,
    point.point,
    drain.drain,
    status.status,
    pause.pause,
    pause.resume,
    settings.set_settings,
    settings.show_settings,
    inspect.inspect,
):
    program.add_command(verb)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit. Every failure is one line on stderr and a code of the contract."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command; the exit code."""
    try:
        rest, invocation = take_global_options(arguments)
        outcome = program.main(rest, prog_name="asrfs", standalone_mode=False, obj=invocation)
        return outcome if isinstance(outcome, int) else 0
    except AsrfsError as error:
        return fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help(), err=True)
        return 2
    except click.ClickException as error:
        return fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        return fail("interrupted", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return fail(describe_os_error(error), 1)


def fail(text: str, code: int) -> int:
    """Print the one line of a failure."""
    click.echo(f"asrfs: error: {' '.join(text.split())}", err=True)
    return code


def describe_os_error(error: OSError) -> str:
    """What the system said, about which file, and what to do where that is known."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    advice = {
        errno.ENOSPC: ": make space there and try again",
        errno.EACCES: ": run this as root",
        errno.EPERM: ": run this as root",
    }
    return f"{where}{(error.strerror or str(error)).lower()}{advice.get(error.errno or 0, '')}"


def take_global_options(arguments: list[str]) -> tuple[list[str], Invocation]:
    """Split `--state DIR` and `--json` from the line, wherever they stand before a `--`."""
    rest: list[str] = []
    state = os.environ.get("ASRFS_STATE") or STATE_DEFAULT
    json = False
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--json":
            json = True
        elif word == "--state":
            given = next(words, None)
            if given is None:
                raise click.UsageError("--state needs a directory")
            state = given
        elif word.startswith("--state="):
            state = word.removeprefix("--state=")
        else:
            rest.append(word)
    return rest, Invocation(Path(state), json)


if __name__ == "__main__":
    main()
