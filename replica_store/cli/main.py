"""Entry of `replica-store`: collects the verbs, takes global options from anywhere, ends with the right exit code."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import click

import replica_store
from asrfs.errors import AsrfsError, BadInputError
from replica_store.cli import export, init, machine, mount, point, rebuild, serve, token, verify
from replica_store.cli.output import Invocation

VAULT_DEFAULT = "/var/lib/replica-store"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(replica_store.__version__, "--version", message="%(version)s")
@click.option("--vault", metavar="DIR", help="The vault; else $REPLICA_STORE_VAULT, else /var/lib/replica-store.")
@click.option("--json", is_flag=True, help="Print one JSON document instead of a table.")
def program(vault: str | None, json: bool) -> None:
    """Keeps the histories of protected machines and gives back any moment of them.

    --vault and --json may stand anywhere on the line.
    """


for verb in (
    init.init,
    serve.serve,
    token.token,
    machine.machine,
    point.point,
    export.export,
    mount.mount,
    verify.verify,
    rebuild.rebuild,
):
    program.add_command(verb)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit. Every failure is one line on stderr and a code of the contract."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command; the exit code."""
    try:
        rest, invocation = take_global_options(arguments)
        outcome = program.main(rest, prog_name="replica-store", standalone_mode=False, obj=invocation)
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
    except Exception as error:
        return fail(f"this is a fault of the program: {type(error).__name__}: {error}", 1)


def fail(text: str, code: int) -> int:
    """Print the one line of a failure."""
    click.echo(f"asrfs: error: {' '.join(text.split())}", err=True)
    return code


def describe_os_error(error: OSError) -> str:
    """What the system said, about which file, and what to do where that is known."""
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    advice = {
        errno.ENOSPC: ": make space there and try again",
        errno.EACCES: ": run this as root or as the store's user",
        errno.EPERM: ": run this as root or as the store's user",
    }
    return f"{where}{(error.strerror or str(error)).lower()}{advice.get(error.errno or 0, '')}"


def take_global_options(arguments: list[str]) -> tuple[list[str], Invocation]:
    """Split `--vault DIR` and `--json` from the line, wherever they stand before a `--`."""
    rest: list[str] = []
    vault = os.environ.get("REPLICA_STORE_VAULT") or VAULT_DEFAULT
    json = False
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--json":
            json = True
        elif word == "--vault":
            given = next(words, None)
            if given is None:
                raise click.UsageError("--vault needs a directory")
            vault = given
        elif word.startswith("--vault="):
            vault = word.removeprefix("--vault=")
        else:
            rest.append(word)
    if "://" in vault:
        raise BadInputError(f"{vault}: a vault is a directory; object stores are not supported by this version")
    return rest, Invocation(Path(vault), json)


if __name__ == "__main__":
    main()
