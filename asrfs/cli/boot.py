"""`asrfs boot`: how the machine is started where it is recovered."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from asrfs.cli.invocation import Invocation, pass_invocation
from asrfs.daemon.boot_change import change_boot
from asrfs.errors import BadInputError, NotFoundError
from asrfs.model.boot import BOOT_BYTES_MAX, NO_BOOT, read_boot
from asrfs.terminal.boot_table import boot_document, boot_rows
from asrfs.terminal.output import pairs

_FILE_BYTES_MAX = 16 * BOOT_BYTES_MAX
"""What people write has comments, too."""


@click.group()
def boot() -> None:
    """How the machine is started where it is recovered. Kept in its history, so each point has its own."""


@boot.command("set")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, allow_dash=True))
@pass_invocation
def set_boot(invocation: Invocation, file: Path) -> None:
    """Take the settings from FILE, in TOML or JSON, or from stdin if it is `-`; also while serving."""
    state = invocation.open_state()
    settings = read_boot(_read(file), "stdin" if str(file) == "-" else str(file))
    change_boot(state, settings)
    document = boot_document(settings)
    invocation.answer(document, lambda out: out.print(pairs(boot_rows(document))))


@boot.command("show")
@pass_invocation
def show_boot(invocation: Invocation) -> None:
    """Show the settings in force from now on."""
    document = boot_document(invocation.open_state().load_machine().boot or NO_BOOT)
    invocation.answer(document, lambda out: out.print(pairs(boot_rows(document))))


def _read(file: Path) -> str:
    try:
        if str(file) == "-":
            content = sys.stdin.buffer.read(_FILE_BYTES_MAX + 1)
        else:
            with file.open("rb") as opened:
                content = opened.read(_FILE_BYTES_MAX + 1)
        if len(content) > _FILE_BYTES_MAX:
            raise BadInputError(f"{file} has more than {_FILE_BYTES_MAX} bytes: these are no boot settings")
        return content.decode()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise BadInputError(f"{file} is not a text") from None
