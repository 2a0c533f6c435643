"""Options by which both programs choose the points that they list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from asrfs.errors import BadInputError
from asrfs.model.clock import Clock
from asrfs.model.marker import CONSISTENCIES
from asrfs.model.names import check_name
from asrfs.model.point_filter import PointFilter, parse_moment

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--since", metavar="TIME", help="From this time on: RFC 3339, or how long ago, such as 4h."),
    click.option("--until", metavar="TIME", help="Up to this time, written the same way."),
    click.option("--consistency", "--kind", type=click.Choice(CONSISTENCIES), help="Only points of this consistency."),
    click.option("--group", metavar="G", help="Only points cut together with group G."),
    click.option("--name", metavar="N", help="Only points of this name."),
    click.option("--limit", metavar="NUMBER", type=click.IntRange(min=1), help="Only the newest so many of those."),
)


def point_options(command: Command) -> Command:
    """Adds the options; `filter_of` makes a filter of what the command is called with."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def group_text(document: Mapping[str, Any]) -> str | None:
    """The group of a point as tables show it; one without all members is labelled."""
    group, ready, members = document["group"], document["ready"], document["members"]
    if group is None or ready is None or ready == len(members):
        return None if group is None else str(group)
    return f"{group}, {ready} of {len(members)}"


def filter_of(options: dict[str, Any], clock: Clock) -> PointFilter:
    """Raises BadInputError."""
    now_ns = clock.time_ns()
    since, until, group, name = (options[key] for key in ("since", "until", "group", "name"))
    since_ns = None if since is None else parse_moment(since, now_ns)
    until_ns = None if until is None else parse_moment(until, now_ns)
    if since_ns is not None and until_ns is not None and since_ns > until_ns:
        raise BadInputError(f"nothing is since {since} and until {until}: give the earlier time first")
    return PointFilter(
        since_ns=since_ns,
        until_ns=until_ns,
        consistency=options["consistency"],
        group=None if group is None else check_name(group, "group"),
        name=None if name is None else check_name(name, "point"),
        limit=options["limit"],
    )
