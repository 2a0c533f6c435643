"""PURE: one picture of all results: for each workload a bar a peer, as long as its share of the best."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from .results import Outcome, Workload, number, ratio, spread_of

WIDTH = 960
_LEFT = 250
_BAR_MAX = 430
_ROW = 18
_BAR = 12
_GAP = 34
_TOP = 56
# fmt: off
_COLOURS = {
    "raw": "#8c8c8c", "passthrough": "#4c78a8", "qemu": "#f2a541", "qemu-mirror": "#d98324",
    "qemu-quorum": "#b3661a", "nbdkit": "#9a6fb0", "s3backer": "#c76b98", "asrfs": "#5fb38a",
    "asrfs-shipping": "#1f7a55",
}
# fmt: on
_OTHER = "#5f8fb3"
_STYLE = "text{font:12px sans-serif;fill:#222}.t{font-weight:bold;font-size:13px}.h{font-size:17px}.n{fill:#666}"


def chart(outcomes: Sequence[Outcome]) -> str:
    """An SVG document. Whiskers show the range of the turns; the ratio is to the workload's reference."""
    parts: list[str] = []
    y = _TOP
    for outcome in outcomes:
        for workload in outcome.workloads:
            if any(workload.turns.values()):
                y = _workload(parts, outcome, workload, y)
    machine = outcomes[0].machine if outcomes else {}
    under = ", ".join(value for name, value in machine.items() if name in ("processor", "kernel"))
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10}" viewBox="0 0 {WIDTH} {y + 10}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{WIDTH}" height="{y + 10}" fill="#fff"/>',
        _text(12, 24, "asrfs and its peers: median of the turns, range as whisker", "h"),
        _text(12, 42, under, "n"),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _workload(parts: list[str], outcome: Outcome, workload: Workload, y: int) -> int:
    """Draw one group of bars from `y` on; where the next one begins."""
    spreads = {peer: found for peer in workload.turns if (found := spread_of(workload, peer)) is not None}
    longest = max((found.high for found in spreads.values()), default=0.0) or 1.0
    better = "less is better" if workload.less_is_better else "more is better"
    parts.append(_text(12, y + 14, f"{outcome.benchmark}: {workload.title} ({workload.unit}, {better})", "t"))
    y += 22
    for peer, found in spreads.items():
        title = outcome.peers[peer].title if peer in outcome.peers else peer
        length, low, high = (found_value / longest * _BAR_MAX for found_value in found)
        middle = y + _BAR / 2
        parts.append(_text(_LEFT - 8, y + 10, title, "", anchor="end"))
        colour = _COLOURS.get(peer, _OTHER)
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>')
        parts.append(
            f'<path d="M{_LEFT + low:.1f} {middle}H{_LEFT + high:.1f}" stroke="#222" stroke-opacity=".6" fill="none"/>'
        )
        parts.append(_text(_LEFT + max(length, high) + 6, y + 10, _label(outcome, workload, peer, found.median), ""))
        y += _ROW
    return y + _GAP - _ROW


def _label(outcome: Outcome, workload: Workload, peer: str, median: float) -> str:
    against = ratio(workload, peer, workload.reference)
    if against is None or peer == workload.reference:
        return number(median)
    facts = outcome.peers.get(workload.reference)
    return f"{number(median)}  ({against:.2f} × {facts.title if facts else workload.reference})"


def _text(x: float, y: float, words: str, style: str, *, anchor: str = "") -> str:
    attributes = f' class="{style}"' if style else ""
    attributes += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{attributes}>{escape(words)}</text>'
