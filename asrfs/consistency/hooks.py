"""Hooks of a machine: which commands run around an application-consistent point, and whether they may.

Each is a file `hooks/NAME.json` in the state directory. They run as we do, which is as root, so that directory, the
files in it, the program of each and every directory that leads there must belong to root (or to us) and be writable
by nobody else. That is looked at when a hook is added and again before it runs.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import msgspec

from asrfs.errors import BadInputError, FormatError, NotFoundError, RefusedError
from asrfs.model.names import check_name
from asrfs.storage.interface import Storage, read_whole, write_atomically

Phase = Literal["pre", "post", "hold", "handover"]
PHASES: tuple[Phase, ...] = get_args(Phase)

HOOKS_MAX = 32
ORDER_MAX = 9999
TIMEOUT_S_MIN, TIMEOUT_S_MAX = 0.1, 3600.0
WORDS_MAX = 64
COMMAND_CHARACTERS_MAX = 4096
LINKS_MAX = 40
_SUFFIX = ".json"


class Hook(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`argv[0]` is an absolute path. A `hold` hook runs from its place among the pre hooks to its place among the post
    hooks: it says a line when it holds, and lets go when its standard input ends. A `handover` hook has nothing to do
    with points: it stops the machine before a planned failover, and starts it again when that is taken back."""

    name: str
    phase: Phase
    argv: tuple[str, ...]
    order: int = 50
    timeout_s: float = 30.0


def before(hooks: Iterable[Hook]) -> list[Hook]:
    """What runs before the instant, in order."""
    return sorted((hook for hook in hooks if hook.phase in ("pre", "hold")), key=_place)


def after(hooks: Iterable[Hook]) -> list[Hook]:
    """What runs after the instant: in reverse order."""
    return sorted((hook for hook in hooks if hook.phase in ("post", "hold")), key=_place, reverse=True)


def of_handover(hooks: Iterable[Hook]) -> list[Hook]:
    """What stops the machine before it is handed over, in order."""
    return sorted((hook for hook in hooks if hook.phase == "handover"), key=_place)


def _place(hook: Hook) -> tuple[int, str]:
    return hook.order, hook.name


def make_hook(phase: Phase, command: str, order: int, timeout_s: float, name: str | None) -> Hook:
    """A hook as a person gave it. Raises BadInputError."""
    try:
        argv = tuple(shlex.split(command))
    except ValueError as error:
        raise BadInputError(f"{command[:80]!r} is not a command: {error}") from None
    hook = Hook(name=name or _name_of(phase, order, argv), phase=phase, argv=argv, order=order, timeout_s=timeout_s)
    check_hook(hook)
    return hook


def _name_of(phase: Phase, order: int, argv: Sequence[str]) -> str:
    program = re.sub(r"[^A-Za-z0-9._-]", "-", os.path.basename(argv[0]) if argv else "")
    return f"{phase}-{order:02d}-{program}"[:63]


def check_hook(hook: Hook) -> None:
    """Raise BadInputError for one that cannot be, whoever may write its program."""
    check_name(hook.name, "hook")
    if not hook.argv or not hook.argv[0].startswith("/"):
        raise BadInputError("a hook's command begins with the absolute path of a program, or names one that is shipped")
    if len(hook.argv) > WORDS_MAX or sum(map(len, hook.argv)) > COMMAND_CHARACTERS_MAX or "\0" in "".join(hook.argv):
        raise BadInputError(f"a hook's command has at most {WORDS_MAX} words and {COMMAND_CHARACTERS_MAX} characters")
    if not 0 <= hook.order <= ORDER_MAX:
        raise BadInputError(f"a hook's order is a number from 0 to {ORDER_MAX}")
    if not TIMEOUT_S_MIN <= hook.timeout_s <= TIMEOUT_S_MAX:
        raise BadInputError(f"a hook's timeout is from {TIMEOUT_S_MIN:g}s to {TIMEOUT_S_MAX:g}s")


class HookFiles:
    """The hooks of a machine, in `storage`, whose directory is `path`."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        self._path = path

    def load(self) -> list[Hook]:
        """By order and name. Raises RefusedError if somebody else could have written one, FormatError for a bad one."""
        if not os.path.isdir(self._path):
            return []
        check_nobody_else_writes(self._path)
        hooks = []
        for name in sorted(self._storage.names("")):
            if name.endswith(_SUFFIX) and not name.startswith("."):
                check_nobody_else_writes(os.path.join(self._path, name))
                hooks.append(decode_hook(read_whole(self._storage, name), name))
        return sorted(hooks, key=_place)

    def add(self, hook: Hook) -> None:
        """Raises RefusedError for a program that somebody else can write, or a name that is used."""
        check_program(hook)
        names = [each.name for each in self.load()]
        if hook.name in names:
            raise RefusedError(f"there is a hook {hook.name} already: remove it first, or give this one another --name")
        if len(names) >= HOOKS_MAX:
            raise RefusedError(f"a machine has at most {HOOKS_MAX} hooks: remove one first")
        write_atomically(self._storage, hook.name + _SUFFIX, msgspec.json.encode(hook) + b"\n")

    def remove(self, name: str) -> None:
        """Raises NotFoundError."""
        check_name(name, "hook")
        if not self._storage.exists(name + _SUFFIX):
            raise NotFoundError(f"there is no hook {name!r}: see `asrfs hooks list`")
        self._storage.unlink(name + _SUFFIX)
        self._storage.sync_directory("")


def decode_hook(content: bytes, name: str) -> Hook:
    """The hook that the file of this name holds. Raises FormatError."""
    try:
        hook = msgspec.json.decode(content, type=Hook)
        check_hook(hook)
    except (msgspec.MsgspecError, ValueError, RecursionError, BadInputError) as error:
        raise FormatError(f"the hook {name} cannot be read: {error}: remove it and add it again") from None
    if hook.name + _SUFFIX != name:
        raise FormatError(f"the hook {name} calls itself {hook.name}: remove it and add it again")
    return hook


def check_program(hook: Hook) -> None:
    """Raise RefusedError unless its program can be run and only we and root can have written it."""
    path = hook.argv[0]
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise RefusedError(f"hook {hook.name}: {path} is not a program that can be run")
    check_nobody_else_writes(path)


def check_nobody_else_writes(path: str) -> None:
    """Raise RefusedError if somebody but root or us could have written it, or put another thing in its place."""
    for place, is_last in _way_to(os.path.abspath(path)):
        if problem := _open_to_others(os.lstat(place), is_last):
            raise RefusedError(f"{place} {problem}: hooks run only from where root alone can write")


def _way_to(path: str) -> Iterator[tuple[str, bool]]:
    """Every directory and link through which the kernel finds it, and itself: `(path, whether it is the last)`."""
    where, rest, links = "/", path.split("/"), 0
    yield where, False
    while rest:
        name = rest.pop(0)
        place = os.path.dirname(where) if name == ".." else os.path.join(where, name)
        if name in ("", ".", ".."):
            where = place if name == ".." else where
            continue
        yield place, not any(rest)
        if not os.path.islink(place):
            where = place
            continue
        links += 1
        if links > LINKS_MAX:
            raise RefusedError(f"{path} leads through more than {LINKS_MAX} links")
        target = os.readlink(place)
        where = "/" if target.startswith("/") else where
        rest = target.split("/") + rest


def _open_to_others(found: os.stat_result, is_last: bool) -> str | None:
    if found.st_uid not in (0, os.geteuid()):
        return f"belongs to user {found.st_uid}"
    if stat.S_ISLNK(found.st_mode):
        return None  # it has no mode of its own: its owner and its directory's say who can change it
    is_shared_directory = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and not is_last
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_shared_directory:
        return "can be written by others"
    return None
