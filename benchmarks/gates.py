"""How often a mix of three or four instances that fits on a node finds its name there (docs/slurm.md, "Names").

    python benchmarks/gates.py

Such mixes have no name of their own; they wait for a request that is surely enough. Counted over random states of a
node, each as likely to be nearly empty as nearly full.
"""

from __future__ import annotations

import random
from itertools import combinations_with_replacement

from rms import geometry, planner
from rms.geometry import Geometry, Layout
from rms.planner import GpuView, View
from rms.request import Request
from slurm import site

STATES = 200


def mixes(known: Geometry, gpus: int, size: int) -> list[Request]:
    """All requests of so many instances of different profiles that an empty node has room for."""
    plain = [p.name for p in known.profiles if p.plain]
    empty = View(tuple(GpuView(str(n), known) for n in range(gpus)), (), None, 0.0)
    drawn = (c for c in combinations_with_replacement(plain, size) if len(set(c)) > 1)
    found = (Request(tuple((name, chosen.count(name)) for name in dict.fromkeys(chosen))) for chosen in drawn)
    return [request for request in found if planner.fits(empty, request)]


def used(known: Geometry, rng: random.Random, full: float) -> Layout:
    """What a GPU may hold: legal placements, one after the other, each with the chance `full` that it is there."""
    taken: Layout = ()
    while rng.random() < full:
        places = [place for p in known.profiles if p.plain for place in known.legal(p.name, taken)]
        if not places:
            break
        taken = (*taken, rng.choice(places))
    return taken


def main() -> None:
    """Print a line for each kind of node."""
    known = geometry.load("A100-80GB")
    whole = max(known.profiles, key=lambda p: p.memory).name
    print("GPUs  instances  mixes   a mix fits  has its name  the worst mix")
    for gpus in (1, 2, 8):
        gates = site.gates(known, gpus)
        for size in (3, 4):
            rng = random.Random(1)
            asked = mixes(known, gpus, size)
            # The lua's way for a mix without a gate: as many empty GPUs as it needs.
            gate = {m: gates.get(m) or Request(((whole, site.empty(known, m)),)) for m in asked}
            fits, let = dict.fromkeys(asked, 0), dict.fromkeys(asked, 0)
            for _ in range(STATES):
                full = rng.uniform(0, 0.8)
                node = (GpuView(str(n), known, blocked=used(known, rng, full)) for n in range(gpus))
                view = View(tuple(node), (), None, 0.0)
                for mix in asked:
                    if planner.fits(view, mix):
                        fits[mix] += 1
                        let[mix] += planner.fits(view, gate[mix])
            share, worst = min((let[mix] / fits[mix], str(mix)) for mix in asked if fits[mix])
            total = sum(fits.values())
            part = 100 * sum(let.values()) / total
            print(f"{gpus:4}{size:11}{len(asked):7}{total:13}{part:12.0f} %  {100 * share:.0f} % ({worst})", flush=True)


if __name__ == "__main__":
    main()
