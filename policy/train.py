"""Training: one value of a GPU's state for every demand and every number of GPUs, learned on exactly solved nodes.

The policy puts an instance where the sum of `value(mix)[class]` over the node's GPUs grows most. Its logits are those
gains; training is policy gradient, on the states that the policy itself visits, with the exact advantage of every
choice from the optimum of nodes of 1, 2 and 3 GPUs (`policy.exact`): by the performance-difference lemma (Kakade and
Langford, ICML 2002) the loss is the acceptance that the policy loses against the optimum. Then the value over time is
learned by playing on larger nodes, where nothing can be solved (`play`).

Fitting the optimum's values by least squares instead closed between -12 and 97 % of the gap from MFI to the optimum
with 2 GPUs; this closes 96 to 99 % with the same 100 numbers: what counts is the order of a few choices in the states
that occur, not the value of all (docs/policy.md has what was measured and tried).
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from policy import evaluate, exact, model, report, rules, seeds, simulator, transitions, workload
from policy.exact import Demand
from policy.rules import Array
from policy.simulator import Node
from policy.transitions import Transitions
from policy.workload import Floats, Jobs
from rms.errors import RequestError

EVENTS, FIRST_EVENTS = 4, 40
"""How many events each chain goes on between two looks at it; and before the first one, since nodes begin empty."""
MOST_SOLVED = 4
"""GPUs of a solved node at most: that has 4.4 million states (`policy.exact.optimum`)."""
SAVE_EVERY = 500
"""Steps between two checkpoints, and two points of the learning curve."""
LOOK_EVERY = 20
"""The same for games."""


Progress = Callable[[str, float], None]


def silent(what: str, done: float) -> None:
    """Nobody is told how far it is."""


class Anchor(NamedTuple):
    """An exactly solved node: its demand, and the optimum's value of each of its states by rank."""

    gpus: int
    shares: Floats
    load: float
    asked: Demand
    value: Floats


class Board(NamedTuple):
    """One GPU on its classes, and the binomials that number the states of a node."""

    moves: Transitions
    after: Array
    before: Array
    binomials: Array


class Look(NamedTuple):
    """What a batch of node states offers, by state, profile and choice (GPU and class after): the two classes, whether
    it is legal, and what it loses against the best choice."""

    old: Array
    new: Array
    legal: Array
    regret: Floats


class Game(NamedTuple):
    """A node to play on: its GPUs, and the shares, load and time limits of its jobs."""

    gpus: int
    shares: Floats
    load: float
    limit: str


class Net(torch.nn.Module):
    """Two values of every class of states, from the shares of the profiles and whether the GPU is alone (`inputs`): at
    a moment, and (`timed`) for integrating over the times that are known. They differ in their last layer."""

    def __init__(self, profiles: int, hidden: int, rank: int, classes: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            [torch.nn.Linear(profiles + 1, hidden), torch.nn.Linear(hidden, rank), torch.nn.Linear(rank, classes)]
        )
        self.timed = torch.nn.Linear(rank, classes)

    def forward(self, asked: torch.Tensor, timed: bool = False) -> torch.Tensor:
        """`inputs` to values; the empty state's is 0."""
        x = asked
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        values: torch.Tensor = self.timed(x) if timed else self.layers[-1](x)
        return values - values[..., :1]

    def numbers(self) -> list[tuple[list[list[float]], list[float]]]:
        """Weights and biases, layer by layer; the last layers of the two values as one."""
        found = [(layer.weight.tolist(), layer.bias.tolist()) for layer in (*self.layers, self.timed)]
        (rows, biases), (more, further) = found[-2:]
        return [*found[:-2], (rows + more, biases + further)]


def inputs(shares: Floats, gpus: int) -> list[float]:
    """What the net is asked with (`policy.model.values`)."""
    return [*shares.tolist(), float(gpus == 1)]


def noticed(b: Board, anchor: Anchor, nodes: Array, lost: float) -> Floats:
    """The shares that these nodes, [node, GPU], estimate of their requests. Of those that find no room a part is
    `lost` elsewhere and never seen; the rest waits, and is seen when it starts."""
    room = (b.after[nodes] >= 0).any(axis=(1, 3)).mean(axis=0)
    seen = anchor.shares * (1 - lost * (1 - room))
    return evaluate.estimated(workload.mix("uniform", b.moves), evaluate.REMEMBERED * seen / seen.sum())


def board(moves: Transitions) -> Board:
    """What training needs to know of a GPU model."""
    after, before = exact.merged(moves)
    return Board(moves, after, before, exact.pascal(len(after), MOST_SOLVED))


def demands(config: dict[str, Any], moves: Transitions, seed: int) -> Iterator[tuple[int, Floats, float]]:
    """The nodes to solve: number of GPUs, shares and load. The named mixes first, then random ones, some of few
    profiles."""
    rng = np.random.default_rng(seeds.TRAINING[seed])
    low, high = config["anchors"]["loads"]
    named = [workload.mix(name, moves) for name in workload.MIXES]
    for gpus, count in config["anchors"]["mixes"].items():
        for i in range(count):
            drawn = rng.dirichlet(np.full(len(moves.profiles), rng.choice([0.4, 1.0, 3.0])))
            yield int(gpus), named[i] if i < len(named) else drawn, float(rng.uniform(low, high))


def anchors(
    config: dict[str, Any], moves: Transitions, seed: int, folder: Path, progress: Progress = silent
) -> list[Anchor]:
    """Solve the nodes, or take them from `folder` where an earlier run has left them."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(demands(config, moves, seed))
    found = []
    for i, (gpus, shares, load) in enumerate(wanted):
        path = folder / f"{gpus}-{i}.npy"
        if not path.exists():
            with path.with_suffix(".part").open("wb") as file:
                np.save(file, exact.optimum(moves, gpus, shares, load).value.astype(np.float32))
            path.with_suffix(".part").replace(path)
        found.append(Anchor(gpus, shares, load, exact.demand(moves, gpus, shares, load), np.load(path)))
        progress("solving nodes", (i + 1) / len(wanted))
    return found


def ranks(b: Board, classes: Array) -> Array:
    """`exact.rank` of many nodes at once; GPUs along the last axis."""
    ordered = np.sort(classes, axis=-1)
    return np.asarray(sum(b.binomials[ordered[..., i] + i, i + 1] for i in range(classes.shape[-1])))


def look(b: Board, anchor: Anchor, nodes: Array) -> Look:
    """What can be done in each of these nodes, [node, GPU], and what it is worth to the optimum."""
    new = b.after[nodes]
    legal = new >= 0
    new = np.maximum(new, 0)
    turned = np.broadcast_to(nodes[:, None, None, None, :], (*new.shape, nodes.shape[1])).copy()
    for g in range(nodes.shape[1]):
        turned[:, g, :, :, g] = new[:, g]
    worth = np.where(legal, anchor.value[ranks(b, turned)], -np.inf)
    best = worth.max(axis=(1, 3), keepdims=True)
    regret = np.where(legal, np.where(legal, best, 0.0) - np.where(legal, worth, 0.0), 0.0)
    old = np.broadcast_to(nodes[:, :, None, None], new.shape)
    flat = (len(nodes), new.shape[2], -1)

    def by_choice(a: Array) -> Array:
        return np.require(np.moveaxis(a, 2, 1).reshape(flat), requirements="W")  # as torch wants it

    return Look(by_choice(old), by_choice(new), by_choice(legal), by_choice(regret))


def go_on(b: Board, anchor: Anchor, nodes: Array, value: Floats, rng: np.random.Generator) -> None:
    """One event in each chain, in place, by the policy of these values."""
    rows = np.arange(len(nodes))
    at = rng.random(len(nodes)) * anchor.asked.most
    arrivals = np.cumsum(anchor.asked.arrivals)
    profile = np.searchsorted(arrivals, at, side="right")
    comes = profile < len(arrivals)
    new = b.after[nodes, np.minimum(profile, len(arrivals) - 1)[:, None]]
    gain = np.where(new >= 0, value[new] - value[nodes][:, :, None], -np.inf).reshape(len(nodes), -1)
    choice = gain.argmax(axis=1)
    placed = comes & (gain[rows, choice] > -np.inf)
    slot = np.minimum((at - arrivals[-1]).clip(0).astype(int), nodes.shape[1] * b.before.shape[1] - 1)
    leaver, which = slot // b.before.shape[1], slot % b.before.shape[1]
    left = b.before[nodes[rows, leaver], which]
    gone = ~comes & (left >= 0)
    taken = choice // new.shape[2]
    nodes[rows[placed], taken[placed]] = new.reshape(len(nodes), -1)[rows, choice][placed]
    nodes[rows[gone], leaver[gone]] = left[gone]


def loss_of(values: torch.Tensor, seen: Look, arrivals: Floats, temperature: float) -> torch.Tensor:
    """The acceptance in points that is lost per mean service time against the optimum, choices drawn by their logits;
    and those logits' temperature."""

    def there(a: Array) -> torch.Tensor:
        return torch.from_numpy(a).to(values.device)

    gain = (values[there(seen.new)] - values[there(seen.old)]) / temperature
    odds = torch.softmax(gain.masked_fill(there(~seen.legal), -1e9), dim=2)
    lost = (odds * there(seen.regret).to(odds.dtype)).sum(dim=2)
    return 100 * (lost @ there(arrivals).to(odds.dtype)).mean()


def train(config: dict[str, Any], seed: int, folder: Path, device: str = "cpu", progress: Progress = silent) -> Net:
    """Train: against exact solutions first, where there are any, then by playing."""
    return play(config, seed, imitate(config, seed, folder, device, progress), folder, progress)


def imitate(config: dict[str, Any], seed: int, folder: Path, device: str = "cpu", progress: Progress = silent) -> Net:
    """Learn the value at a moment against exactly solved nodes, going on from the checkpoint in `folder` if there is
    one. Writes the learning curve beside it. Without such nodes the net is left at random values."""
    torch.set_num_threads(1)
    moves = transitions.load(config["model"])
    b = board(moves)
    solved = anchors(config, moves, seed, folder / "anchors", progress)
    torch.manual_seed(seed)
    net = Net(len(moves.profiles), config["net"]["hidden"], config["net"]["rank"], len(b.after)).to(device)
    if not solved:
        return net
    options = config["training"]
    optimiser = torch.optim.Adam(net.parameters(), lr=options["rate"])
    rng = np.random.default_rng(seeds.TRAINING[seed])
    # As many of each number of GPUs in a batch: there are few solved nodes of three, and what they tell counts as much.
    by_size = [[i for i, a in enumerate(solved) if a.gpus == gpus] for gpus in sorted({a.gpus for a in solved})]
    share = max(1, options["batch"] // max(1, len(by_size)))
    chains = [np.zeros((options["chains"], a.gpus), dtype=np.int64) for a in solved]
    curve: list[dict[str, float]] = []
    saved = folder / "checkpoint.pt"
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True, map_location=device)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        chains = [chain.cpu().numpy() for chain in state["chains"]]
        curve, first = state["curve"], state["step"]
        rng = np.random.default_rng([seeds.TRAINING[seed], first])
    began, recent = time.monotonic(), []
    for step in range(first, options["steps"]):
        done = step / options["steps"]
        hot, cold = options["temperature"]
        temperature = hot * (cold / hot) ** done
        for group in optimiser.param_groups:
            group["lr"] = options["rate"] * (1 - done)
        picked = np.concatenate([rng.choice(alike, min(share, len(alike)), replace=False) for alike in by_size])
        asked = [inputs(noticed(b, solved[i], chains[i], rng.random()), solved[i].gpus) for i in picked]
        values = net(torch.tensor(asked, device=device))
        losses = []
        for i, of in zip(picked, values, strict=True):
            greedy = of.detach().cpu().numpy().astype(np.float64)
            for _ in range(EVENTS if step else FIRST_EVENTS):
                go_on(b, solved[i], chains[i], greedy, rng)
            losses.append(loss_of(of, look(b, solved[i], chains[i]), solved[i].asked.arrivals, temperature))
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        recent.append(float(loss.detach()))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == options["steps"]:
            seconds = time.monotonic() - began
            curve.append({"step": step + 1, "lost points": float(np.mean(recent)), "seconds": seconds})
            progress(f"anchor, {np.mean(recent):.3f} points lost", (step + 1) / options["steps"])
            recent = []
            torch.save(
                {
                    "net": net.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "chains": [torch.from_numpy(chain) for chain in chains],
                    "curve": curve,
                    "step": step + 1,
                },
                saved.with_suffix(".part"),
            )
            saved.with_suffix(".part").replace(saved)
            note(folder / "curve.json", curve, "lost points")
    return net


def play(config: dict[str, Any], seed: int, net: Net, folder: Path, progress: Progress = silent) -> Net:
    """Learn the value for integrating over time where nothing is solved: by the waits on whole nodes with a queue.

    Evolution strategies on the values (`slope`), for one mix at a time, and from there on backwards through the net.
    The result lies between the start and the mean of the last weights, which has noise in it. Goes on from the
    checkpoint in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moves = transitions.load(config["model"])
    options = config["playing"]
    device = net.timed.bias.device
    net.timed.load_state_dict(net.layers[-1].state_dict())
    optimiser = torch.optim.Adam(net.timed.parameters(), lr=options["rate"], betas=(0.9, 0.99))
    mean = {name: value.clone() for name, value in net.timed.state_dict().items()}
    curve: list[dict[str, float]] = []
    saved, first, began = folder / "playing.pt", 0, time.monotonic()
    if saved.exists():
        state = torch.load(saved, weights_only=True, map_location=device)
        net.timed.load_state_dict(state["timed"])
        optimiser.load_state_dict(state["optimiser"])
        mean, curve, first = state["mean"], state["curve"], state["step"]
    before = examine(config, moves, net) if not curve else 0.0
    for step in range(first, options["steps"]):
        for group in optimiser.param_groups:
            group["lr"] = options["rate"] * (1 - step / options["steps"])
        rng = dice(seed, step)
        game = draw(options, moves, step, rng)
        values = net(torch.tensor(inputs(game.shares, game.gpus), device=device), timed=True)
        centre = values.detach().cpu().numpy().astype(np.float64)
        reach = options["noise"] * centre.std()
        gradient = slope(config, moves, game, centre, reach, rng) / options["pairs"] / reach
        optimiser.zero_grad()
        values.backward(torch.from_numpy(gradient).float().to(device))
        optimiser.step()
        for name, value in net.timed.state_dict().items():
            mean[name].lerp_(value, 1 / min(step + 1, options["averaged"]))
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == options["steps"]:
            now = {name: value.clone() for name, value in net.timed.state_dict().items()}
            net.timed.load_state_dict(mean)
            if not curve:
                curve.append({"step": 0, "wait": before, "seconds": 0.0})
            curve.append({"step": step + 1, "wait": examine(config, moves, net), "seconds": time.monotonic() - began})
            net.timed.load_state_dict(now)
            waited = curve[-1]["wait"] / curve[0]["wait"]
            progress(f"playing, waits {waited:.3f} of before", (step + 1) / options["steps"])
            kept = {"timed": now, "optimiser": optimiser.state_dict(), "mean": mean, "curve": curve, "step": step + 1}
            torch.save(kept, saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)
            note(folder / "playing.json", curve, "wait")
    start = net.layers[-1].state_dict()
    net.timed.load_state_dict({name: start[name].lerp(value, options["kept"]) for name, value in mean.items()})
    return net


def slope(
    config: dict[str, Any], moves: Transitions, game: Game, value: Floats, reach: float, rng: np.random.Generator
) -> Floats:
    """In which direction of the values the mean wait grows: the sum over pairs of runs, each over the same jobs with
    the values moved by the same noise, `reach` times, one way and the other (antithetic sampling; Salimans et al.,
    arXiv:1703.03864)."""
    options = config["playing"]
    found = np.zeros(len(value))
    for _ in range(options["pairs"]):
        noise = rng.normal(size=len(value))
        jobs = stream(moves, game, options["jobs"], int(rng.integers(len(seeds.TRAINING))))
        more, less = (waits(config, moves, game, jobs, value + way * reach * noise) for way in (1, -1))
        found += noise * (more - less) / (more + less)
    return found


def dice(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one game."""
    return np.random.default_rng([seeds.TRAINING[seed], step])


def draw(options: dict[str, Any], moves: Transitions, step: int, rng: np.random.Generator) -> Game:
    """A node to play on: in turn a named mix and a random one."""
    names = list(workload.MIXES)
    drawn = rng.dirichlet(np.full(len(moves.profiles), rng.choice([1.0, 3.0])))
    shares = drawn if step % 2 else workload.mix(names[step // 2 % len(names)], moves)
    load = float(rng.uniform(*options["loads"]))
    return Game(int(rng.choice(options["gpus"])), shares, load, str(rng.choice(options["limits"])))


def stream(moves: Transitions, game: Game, count: int, seed: int) -> Jobs:
    """Jobs for a game."""
    return workload.stream(moves, seeds.TRAINING[seed], count, game.shares, game.load, game.gpus, limit=game.limit)


def waits(config: dict[str, Any], moves: Transitions, game: Game, jobs: Jobs, value: Floats) -> float:
    """The mean wait under these values of the classes; how much too long limits are is known."""
    ratios = np.sort((jobs.duration / jobs.limit)[: evaluate.REMEMBERED])
    t = rules.tables(config["model"])
    guesses = model.GUESSES if ratios[0] < ratios[-1] else 1
    foresight = config["rule"]["foresight"]
    rule = rules.by_value(t, value[np.array(moves.classes)], foresight, ratios=ratios, draws=guesses)
    w = simulator.simulate(t, Node(game.gpus, depth=evaluate.DEPTH), rule, jobs)
    return float(evaluate.waits(jobs, w).mean())


def examine(config: dict[str, Any], moves: Transitions, net: Net) -> float:
    """The mean wait over the named mixes at 8 GPUs, load 0.8; the same jobs each time."""
    found = []
    for i, name in enumerate(workload.MIXES):
        game = Game(8, workload.mix(name, moves), 0.8, config["playing"]["limits"][0])
        with torch.no_grad():
            asked = torch.tensor(inputs(game.shares, game.gpus), device=net.timed.bias.device)
            value = net(asked, timed=True).cpu().numpy().astype(np.float64)
        for seed in range(4):
            found.append(waits(config, moves, game, stream(moves, game, 40_000, 10 * i + seed), value))
    return float(np.mean(found))


def note(path: Path, curve: list[dict[str, float]], what: str) -> None:
    """Write a learning curve, and its picture beside it."""
    path.write_text(json.dumps(curve, indent=1) + "\n")
    values = [point[what] for point in curve]
    drawn = report.curves([values], curve[-1]["step"], report.nice(max(values)), ["#2563eb"])
    path.with_suffix(".svg").write_text(drawn + "\n")


def run(config_path: str, seed: int, out: str, folder: str, device: str = "cpu", progress: Progress = silent) -> None:
    """`rms train`: train and write the model to `out`; what a later run needs to go on is in `folder`."""
    with open(config_path, "rb") as file:
        try:
            config = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"{config_path}: {error}") from error
    if lacking := {"model", "anchors", "net", "playing", "rule"} - config.keys():
        raise RequestError(f"{config_path} lacks {' '.join(sorted(lacking))}; policy/configs has examples")
    if not Path(out).absolute().parent.is_dir():  # or that would be found out once all is trained
        raise RequestError(f"{out}: there is no such directory")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"--device {device}: torch finds no such device here")
    made = {"config": config, "seed": seed, "commit": commit()}  # now: the files may change while it trains
    net = train(config, seed, Path(folder), device, progress)
    moves = transitions.load(config["model"])
    prior = workload.mix("uniform", moves)
    data = model.pack(moves, net.numbers(), prior.tolist(), config["rule"], made, trained(config, moves, seed))
    Path(out).write_bytes(data)


def mixes(config: dict[str, Any], moves: Transitions, seed: int) -> Floats:
    """The shares of all mixes that are trained on, [mix, profile]."""
    games = (draw(config["playing"], moves, i, dice(seed, i)) for i in range(config["playing"]["steps"]))
    return np.array([*(shares for _, shares, _ in demands(config, moves, seed)), *(game.shares for game in games)])


def trained(config: dict[str, Any], moves: Transitions, seed: int) -> list[list[float]]:
    """The least and the largest share of each profile in all mixes that were trained on."""
    return [[float(x.min().round(6)), float(x.max().round(6))] for x in mixes(config, moves, seed).T]


def commit() -> str:
    """The commit of the code that trains, with a + where files differ from it; empty where there is none."""
    import subprocess

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
