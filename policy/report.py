"""What `rms simulate` shows: a table, and a page of its own with pictures (inline SVG, nothing is fetched)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10
from typing import Any

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#475569", "#92400e")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 900, 300, 64, 44, 14
"""Of a picture, and of the room beside its axes."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 1040px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem } p { margin: .3rem 0; }
.note { color: #64748b; font-size: .88rem; overflow-wrap: anywhere }
.wide { overflow-x: auto; font-size: .88rem }
table { border-collapse: collapse; margin-top: 1rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: #64748b; font-weight: 600 }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif } .key { font-size: .88rem; margin-right: 1.1rem }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px }
"""


def table(found: dict[str, Any]) -> list[list[str]]:
    """The numbers as rows of text, the first one the titles."""
    loss = found["mode"] == "loss"
    policies = found["policies"]
    # A profile's own column is what tells policies apart, so it is in the table, too.
    profiles = list(dict.fromkeys(name for row in policies for name in row["profiles"]))
    measures = ["accepted %"] if loss else ["mean wait", "p95 wait"]
    needed = ["GPUs needed", "at most"] if found["mode"] == "elastic" else []
    first = policies[0]["policy"]
    against = [f"points to {first}" if loss else f"% to {first}"] if len(policies) > 1 else []
    rows = [["policy", *measures, *against, "creates/job", *needed, *profiles]]
    for row in policies:
        key = "accepted" if loss else "wait_mean"
        values = [length(row[key], loss)] if loss else [length(row["wait_mean"]), length(row["wait_p95"])]
        needs = [number(row["gpus_needed"]), number(row["gpus_most"])] if needed else []
        difference = [gain(row)] if against else []
        own = [length(row["profiles"][name][key], loss) for name in profiles]
        rows.append([row["policy"], *values, *difference, number(row["creates_per_job"]), *needs, *own])
    return rows


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
    else:
        lines.append(f"waits in {found['time']}; under each profile its mean")
    if len(found["policies"]) > 1:
        lines.append("±: half the 95 % interval, over 20 blocks of successive jobs")
    if found["left_out"]:
        lines.append("left out: " + "; ".join(f"{count:,} {reason}" for reason, count in found["left_out"].items()))
    return lines


def page(found: dict[str, Any]) -> str:
    """The whole report as one HTML page."""
    policies = found["policies"]
    names = [row["policy"] for row in policies]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    key = "".join(f'<span class="key"><i style="background:{colours[n]}"></i>{escape(n)}</span>' for n in names)
    loss = found["mode"] == "loss"
    unit = "percent of memory slices" if loss else found["time"]
    measure = "accepted" if loss else "wait_mean"
    profiles = list(dict.fromkeys(name for row in policies for name in row["profiles"]))
    by_profile = [[row["profiles"][name][measure] for row in policies] for name in profiles]
    whole = (
        [[row["accepted"] for row in policies]]
        if loss
        else [
            [row["wait_mean"] for row in policies],
            [row["wait_p95"] for row in policies],
        ]
    )
    head, *body = table(found)
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    series = [row["busy_slices"] for row in policies]
    stretch = found["span"] / 3600 if found["time"] == "seconds" else found["span"]
    along = "hours" if found["time"] == "seconds" else "mean durations"
    pictures = [
        ("Policies compared", unit, bars(["accepted"] if loss else ["mean", "p95"], whole, list(colours.values()))),
        (
            "Acceptance per profile" if loss else "Mean wait per profile",
            unit,
            bars(profiles, by_profile, list(colours.values())),
        ),
        (
            "Busy memory slices over time",
            f"of {found['slices']}; {along} since the first job",
            curves(series, stretch, found["slices"], list(colours.values())),
        ),
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


def curves(series: Sequence[Sequence[float]], until: float, most: float, colours: Sequence[str]) -> str:
    """A line for each policy over time, from 0 to `until`."""
    lines, scale = frame([most * i / 4 for i in range(5)])
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
