"""What `rms simulate` shows: a table, and a page of its own with pictures (inline SVG, nothing is fetched). Training
draws its curves with the same."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10
from typing import Any

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#475569", "#92400e")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 900, 300, 64, 44, 14
"""Of a picture, and of the room beside its axes."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem } p { margin: .3rem 0; }
.note { color: #64748b; font-size: .88rem; overflow-wrap: anywhere }
.wide { overflow-x: auto; font-size: .84rem }
table { border-collapse: collapse; margin-top: 1rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: #64748b; font-weight: 600 }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif } .key { font-size: .88rem; margin-right: 1.1rem }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px }
"""


def table(found: dict[str, Any]) -> list[list[str]]:
    """The numbers as rows of text, the first one the titles."""
    loss, elastic = found["mode"] == "loss", found["mode"] == "elastic"
    policies = found["policies"]
    measures = ["accepted %"] if loss else ["mean wait", "p95 wait"]
    needed = ["GPUs needed", "at most"] if elastic else []
    first = policies[0]["policy"]
    against = [f"points to {first}" if loss else f"% to {first}"] if len(policies) > 1 else []
    # In an elastic pool hardly anybody waits: no column for each profile there.
    profiles = [] if elastic else named(found)
    rows = [["policy", *needed, *measures, *against, "creates/job", *profiles]]
    for row in policies:
        key = "accepted" if loss else "wait_mean"
        values = [length(row[key], loss)] if loss else [length(row["wait_mean"]), length(row["wait_p95"])]
        needs = [number(row["gpus_needed"]), number(row["gpus_most"])] if elastic else []
        difference = [gain(row)] if against else []
        own = [length(row["profiles"][name][key], loss) for name in profiles]
        rows.append([row["policy"], *needs, *values, *difference, number(row["creates_per_job"]), *own])
    return rows


def named(found: dict[str, Any]) -> list[str]:
    """The profiles that were asked for."""
    return list(found["policies"][0]["profiles"])


def number(value: float | int | None) -> str:
    """A number of two places, or a whole one."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def length(value: float, percent: bool = False) -> str:
    """A wait, or a share: as many places as say something."""
    return f"{value:.2f}" if percent else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def gain(row: dict[str, Any]) -> str:
    """The difference to the first policy with its interval."""
    half = row["interval"]
    return f"{row['against_first']:+.2f}" + ("" if half is None else f" ± {half:.2f}")


def text(found: dict[str, Any]) -> str:
    """The table for a terminal."""
    rows = table(found)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([headline(found), *notes(found), "", *lines, ""])


def headline(found: dict[str, Any]) -> str:
    """What was simulated, in a line."""
    pool = f"up to {found['gpus']}" if found["mode"] == "elastic" else str(found["gpus"])
    reservation = ", a GPU reserved for the large job" if found["reservation"] else ""
    return f"{found['jobs']}; {pool} {found['model']}; {found['mode']}{reservation}"


def notes(found: dict[str, Any]) -> list[str]:
    """What the numbers are, and what was left out."""
    lines = []
    if found["mode"] == "loss":
        lines.append("accepted: memory slices, in percent of the offered; a request that does not fit is lost")
    elif found["mode"] == "elastic":
        lines.append(f"GPUs with an instance in use, mean and most; waits in {found['time']}; %: of the mean of GPUs")
    else:
        lines.append(f"waits in {found['time']}; under each profile its mean")
    if any(row["interval"] for row in found["policies"]):
        lines.append("±: half the 95 % interval, over 20 blocks of successive jobs")
    if found["left_out"]:
        lines.append("left out: " + "; ".join(f"{count:,} {reason}" for reason, count in found["left_out"].items()))
    return lines


def page(found: dict[str, Any]) -> str:
    """The whole report as one HTML page."""
    names = [row["policy"] for row in found["policies"]]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(names))]
    key = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in zip(names, colours, strict=True)
    )
    head, *body = table(found)
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    elastic = found["mode"] == "elastic"
    pictures = [
        compared(found, colours),
        over_time(found, "busy_gpus", colours) if elastic else apart(found, colours),
        over_time(found, "busy_slices", colours),
    ]
    figures = "".join(
        f'<h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{picture}' for title, note, picture in pictures
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>RMS simulation</title><style>{STYLE}</style></head><body><h1>RMS simulation</h1>"
        f"<p>{escape(headline(found))}</p>{''.join(f'<p class=note>{escape(line)}</p>' for line in notes(found))}"
        f'<div class="wide"><table><tr>{"".join(f"<th>{escape(cell)}</th>" for cell in head)}</tr>{cells}</table></div>'
        f"<p style='margin-top:1.5rem'>{key}</p>{figures}</body></html>\n"
    )


Picture = tuple[str, str, str]
"""Its title, what its numbers are, and its SVG."""


def compared(found: dict[str, Any], colours: Sequence[str]) -> Picture:
    """The policies as a whole, by what the mode is about."""
    rows = found["policies"]
    kinds, unit = {
        "queue": ({"mean wait": "wait_mean", "p95 wait": "wait_p95"}, found["time"]),
        "loss": ({"accepted": "accepted"}, "percent of memory slices"),
        "elastic": ({"GPUs needed, mean": "gpus_needed", "at most": "gpus_most"}, "GPUs with an instance in use"),
    }[found["mode"]]
    return "Policies compared", unit, bars(list(kinds), [[row[key] for row in rows] for key in kinds.values()], colours)


def apart(found: dict[str, Any], colours: Sequence[str]) -> Picture:
    """What each profile gets."""
    key = "accepted" if found["mode"] == "loss" else "wait_mean"
    groups = [[row["profiles"][name][key] for row in found["policies"]] for name in named(found)]
    if found["mode"] == "loss":
        return "Acceptance per profile", "percent", bars(named(found), groups, colours)
    return "Mean wait per profile", found["time"], bars(named(found), groups, colours)


def over_time(found: dict[str, Any], what: str, colours: Sequence[str]) -> Picture:
    """The slices that jobs hold, or the GPUs that have any."""
    series = [row[what] for row in found["policies"]]
    seconds = found["time"] == "seconds"
    until = found["span"] / 3600 if seconds else found["span"]
    # A fixed pool is seen against what it has; an elastic one's most is only a limit.
    elastic = found["mode"] == "elastic"
    ticks = nice(max(map(max, series))) if elastic else [found["slices"] * i / 4 for i in range(5)]
    since = f"{'hours' if seconds else 'mean durations'} since the first job"
    title, note = (
        ("GPUs in use", since) if what == "busy_gpus" else ("Busy memory slices", f"of {found['slices']}; {since}")
    )
    return f"{title} over time", note, curves(series, until, ticks, colours)


def nice(most: float) -> list[float]:
    """Round numbers from 0 to the first one that is not below `most`."""
    if most <= 0:
        return [0.0, 1.0]
    magnitude = 10.0 ** floor(log10(most))
    step = next(s * magnitude for s in (0.1, 0.2, 0.25, 0.5, 1, 2) if s * magnitude * 6 >= most)
    count = int(-(-most // step))
    return [i * step for i in range(count + 1)]


def frame(ticks: Sequence[float]) -> tuple[str, float]:
    """The vertical axis with a line for each tick, and the length of one unit."""
    scale = (HEIGHT - TOP - BOTTOM) / ticks[-1]
    base = HEIGHT - BOTTOM
    lines = "".join(
        f'<path d="M{LEFT} {base - tick * scale:.1f}H{WIDTH}" stroke="{"#94a3b8" if tick == 0 else "#e2e8f0"}"/>'
        f'<text x="{LEFT - 8}" y="{base - tick * scale + 4:.1f}" text-anchor="end" fill="#64748b">{tick:,.6g}</text>'
        for tick in ticks
    )
    return lines, scale


def svg(inside: str) -> str:
    """A picture."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">{inside}</svg>'


def bars(labels: Sequence[str], groups: Sequence[Sequence[float]], colours: Sequence[str]) -> str:
    """For each label a group of bars, one for each policy."""
    lines, scale = frame(nice(max(max(group) for group in groups)))
    base, room = HEIGHT - BOTTOM, (WIDTH - LEFT) / len(groups)
    width = min(40.0, 0.8 * room / len(groups[0]))
    drawn = ""
    for i, (label, group) in enumerate(zip(labels, groups, strict=True)):
        middle = LEFT + (i + 0.5) * room
        for j, value in enumerate(group):
            x, high = middle + (j - len(group) / 2) * width, value * scale
            drawn += (
                f'<rect x="{x + 1:.1f}" y="{base - high:.1f}" width="{width - 2:.1f}" height="{high:.1f}" rx="1.5" '
                f'fill="{colours[j]}"><title>{escape(label)}: {length(value)}</title></rect>'
            )
        drawn += f'<text x="{middle:.1f}" y="{base + 20}" text-anchor="middle" fill="#1e293b">{escape(label)}</text>'
    return svg(lines + drawn)


def curves(series: Sequence[Sequence[float]], until: float, ticks: Sequence[float], colours: Sequence[str]) -> str:
    """A line for each policy over time, from 0 to `until`."""
    lines, scale = frame(ticks)
    base, room = HEIGHT - BOTTOM, WIDTH - LEFT - 20
    for tick in nice(until):
        if tick <= until:
            lines += (
                f'<text x="{LEFT + tick / until * room:.1f}" y="{base + 20}" text-anchor="middle" '
                f'fill="#64748b">{tick:,.6g}</text>'
            )
    for values, colour in zip(series, colours, strict=True):
        points = " ".join(
            f"{LEFT + (i + 0.5) / len(values) * room:.1f},{base - value * scale:.1f}" for i, value in enumerate(values)
        )
        lines += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.4" stroke-opacity=".85"/>'
    return svg(lines)
