"""The frame of a program: verbs imported when called, options that stand anywhere, failures as one line and a code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import ClassVar

import click

from asrfs.errors import AsrfsError
from asrfs.storage.priority import wait_for_others

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Verbs(click.Group):
    """A program's verbs, by the place each lives at: `module:attribute` below `package`.

    A verb is imported when it is called: scripts call one at a time, and often.
    """

    package = ""
    places: ClassVar[Mapping[str, str]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = self.places.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command = getattr(import_module(f"{self.package}.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command


def run(program: click.Group, name: str, invoke: Callable[[], tuple[list[str], object]]) -> int:
    """Run one command and return its exit code. Every failure is one line on stderr and a code of the contract.

    `invoke` gives the words without the global options, and the object the verbs are called with.
    """
    wait_for_others()
    try:
        try:
            words, invocation = invoke()
            with program.make_context(name, words, obj=invocation) as context:
                outcome = program.invoke(context)
            return outcome if isinstance(outcome, int) else 0
        except BaseExceptionGroup as group:
            raise _only_one(group) from None
    except click.exceptions.Exit as ended:
        return ended.exit_code
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
    except UnicodeEncodeError as error:
        return _fail_for_text(error)
    except Exception as error:
        return fail(f"this is a fault of the program: {type(error).__name__}: {error}", 1)


def _only_one(error: BaseException) -> BaseException:
    """What really happened, if it was one thing: what a task of a nursery raises comes in a group for each nursery."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _fail_for_text(error: UnicodeEncodeError) -> int:
    """A path may be any bytes, and what is written down is text: only what was given can be such a path."""
    if "surrogates" in error.reason:
        return fail(f"{error.object!r} is not UTF-8: choose a path that is", 2)
    return fail(f"this is a fault of the program: {type(error).__name__}: {error}", 1)


def fail(text: str, code: int) -> int:
    """Print the one line of a failure; the code."""
    click.echo(f"asrfs: error: {' '.join(text.split())}", err=True)
    return code


def describe_os_error(error: OSError) -> str:
    """What the system said, about which file, and what to do where that is known."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    if not where and error.errno == errno.ENOENT and _is_nowhere():
        return "the current directory is gone: change to another, or give absolute paths"
    advice = {
        errno.ENOSPC: ": make space there and try again",
        errno.EACCES: ": run this as root or as the owner",
        errno.EPERM: ": run this as root or as the owner",
        errno.EMFILE: ": allow more of them (`ulimit -n`)",
        errno.ENFILE: ": allow more of them (`sysctl fs.file-max`)",
    }
    return f"{where}{(error.strerror or str(error)).lower()}{advice.get(error.errno or 0, '')}"


def _is_nowhere() -> bool:
    """Whether the current directory was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def take_global_options(words: list[str], option: str) -> tuple[list[str], str | None, bool]:
    """`(the other words, value of `option` or None, whether --json was there)`; looks no further than a `--`."""
    rest: list[str] = []
    value: str | None = None
    json = False
    remaining = iter(words)
    for word in remaining:
        if word == "--":
            rest += [word, *remaining]
        elif word == "--json":
            json = True
        elif word == option:
            value = next(remaining, None)
            if value is None:
                raise click.UsageError(f"{option} needs a directory")
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
        else:
            rest.append(word)
    return rest, value, json
