"""The text of ``docs/scoreboard.md`` from the details of an evaluation.

This module must not know how the figures came about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from policies.lineup import ALL, REFERENCES, is_peer, is_rule
from training.judging.head_to_head import GROUPS, LEARNED, PARTS, HeadToHead, head_to_heads, misses
from training.judging.scenario_runs import DEFAULT, label
from training.judging.standings import MODES, WITHOUT_FORESIGHT, Standing, add_ratios, best_peer, cheapest, standings_of
from training.pages.tables import shown_ratio, table
from training.replaying.scores import REFERENCE

Row = dict[str, Any]
TITLES = {"generated": "Generated traffic", "real": "Recorded traffic"}


def page(details: Row) -> str:
    """The whole page, Markdown."""
    rows: list[Row] = details["by_scenario"]
    scenarios: list[Row] = details["scenarios"]
    for scenario in scenarios:
        add_ratios(_of(rows, scenario))
    planned = any(row["policy"] == "plan" for row in rows)
    shown = [told for name, told in _REFERENCES.items() if any(row["policy"] == name for row in rows)]
    beside = f", beside references that nobody can run: {'; '.join(shown)}" if shown else ""
    parts = [_HEAD.format(suite=details["suite"], scenarios=len(scenarios), references=beside)]
    for source, title in TITLES.items():
        chosen = [scenario for scenario in scenarios if scenario["source"] == source]
        if not chosen:
            continue
        parts += [f"## {title}: {_ROOM if planned else _BEST}", _room(rows, chosen, planned), _not_servable(chosen)]
        parts += [f"## {title}: every policy", _every_policy(standings_of(rows, scenarios, source), planned)]
    parts += _learned(rows, scenarios, _engines(details["policies"]))
    parts += ["## Scenarios", _scenarios(scenarios, details["skipped"])]
    parts += ["## Tuning", _tuning(details["tunings"])]
    versions = ", ".join(f"{name} {version}" for name, version in details["versions"].items())
    parts.append(_FOOT.format(command=_command(details), versions=versions))
    return "\n\n".join(part for part in parts if part) + "\n"


_ROOM, _BEST = "the room that is left", "the best of each kind"
_REFERENCES = {
    "bound": "the *fluid bound*, below which no policy holds the SLO",
    "plan": "the *clairvoyant plan*, which knows the traffic and was proved in the simulator",
    "best-static": "the *best static fleet* in hindsight",
}
_HEAD = """# Scoreboard

What every policy costs on the suite `{suite}` ({scenarios} scenarios){references}.
[evaluation.md](evaluation.md) says how everything is computed and counted. The command at the foot writes this page
from a clean checkout.

Policies appear as their projects ship them (*default*), tuned on other traffic of the same kind (*train*), these
settings moved at run time by the measured attainment (*self*), and tuned on the very traffic that they are judged on
(*hindsight*, a gift that no operator gets). A policy that misses the attainment target has no cost here: `-`."""

_FOOT = """---

Written by `{command}`; {versions}."""


def _command(details: Row) -> str:
    """What writes this page: everything that is not the default of ``make scoreboard`` is named."""
    rows = details["by_scenario"]
    modes = [mode for mode in MODES if any(row["tuned"] == mode for row in rows)]
    named = [item["policy"] for item in details["policies"]]
    named += [name for name in REFERENCES if any(row["policy"] == name for row in rows)]
    words = [
        "make scoreboard",
        "" if details["suite"] == "dev" else f"SUITE={details['suite']}",
        "" if modes == list(MODES) else f"TUNED={','.join(modes)}",
        "" if set(named) == {*ALL, *REFERENCES} else f"POLICY={','.join(named)}",
    ]
    return " ".join(filter(None, words))


def _engines(policies: Sequence[Row]) -> list[str]:
    """Engines that the learned policy was trained on."""
    return next((item.get("engines", []) for item in policies if item["policy"] == LEARNED), [])


def _of(rows: Sequence[Row], scenario: Row) -> list[Row]:
    return [row for row in rows if row["scenario"] == scenario["name"]]


def _room(rows: Sequence[Row], scenarios: Sequence[Row], planned: bool) -> str:
    """Per scenario: references, best peer by tuning, best own rule, the learned policy; no empty columns."""
    columns: dict[str, Callable[[list[Row]], Row | None]] = {
        "bound": lambda own: _reference(own, "bound"),
        "plan": lambda own: _reference(own, "plan"),
        "best static": lambda own: _reference(own, "best-static"),
        "best peer, default": lambda own: best_peer(own, ("default",)),
        "best peer, train": lambda own: best_peer(own, ("train",)),
        "best peer, self": lambda own: best_peer(own, ("self",)),
        "best peer, hindsight": lambda own: best_peer(own, ("hindsight",)),
        "best own rule": lambda own: cheapest(
            row for row in own if is_rule(row["policy"]) and row["tuned"] in WITHOUT_FORESIGHT
        ),
        "learned": lambda own: _learned_row(own, DEFAULT),
        "learned, train": lambda own: _learned_row(own, "train"),
    }
    found = {scenario["name"]: _of(rows, scenario) for scenario in scenarios}
    judged = {name: choose for name, choose in columns.items() if any(choose(own) for own in found.values())}
    lines = [(name, *(_cost(choose(own), column) for column, choose in judged.items())) for name, own in found.items()]
    over = "in brackets, the cost over the plan's; " if planned else ""
    told = f"Dollars per million tokens; {over}then the policy."
    return f"{table(('scenario', *judged), lines)}\n\n{told}"


def _reference(rows: Sequence[Row], name: str) -> Row | None:
    return cheapest(row for row in rows if row["policy"] == name and row["tuned"] == REFERENCE)


def _learned_row(rows: Sequence[Row], tuned: str) -> Row | None:
    return cheapest(row for row in rows if row["policy"] == LEARNED and row["tuned"] == tuned)


def _cost(row: Row | None, column: str) -> str:
    if row is None:
        return "-"
    over = "" if row["cost_vs_plan"] is None else f" ({row['cost_vs_plan']:.2f})"
    named = "" if row["tuned"] == REFERENCE or column.startswith(LEARNED) else f" {_named(row, column)}"
    return f"{row['usd_per_mtok']:.3f}{over}{named}"


def _named(row: Row, column: str) -> str:
    return label(row["policy"], row["tuned"]) if "own" in column else str(row["policy"])


def _not_servable(scenarios: Sequence[Row]) -> str:
    names = [scenario["name"] for scenario in scenarios if scenario["servable"] is False]
    return f"Not even the clairvoyant plan holds the SLO of: {'; '.join(names)}." if names else ""


def _every_policy(found: Sequence[Standing], planned: bool) -> str:
    """Held scenarios and geometric means of the cost over the plan's, or the best peer's where none was searched."""
    by_name: dict[str, dict[str, Standing]] = {}
    for item in found:
        by_name.setdefault(item.policy, {})["default" if item.tuned == REFERENCE else item.tuned] = item
    judged = [mode for mode in MODES if any(mode in modes for modes in by_name.values())]
    lines = []
    for name, modes in by_name.items():
        kind = "peer" if is_peer(name) else "own rule" if is_rule(name) else "" if name == LEARNED else "reference"
        lines.append((name, kind, *(_standing(modes[mode], planned) if mode in modes else "" for mode in judged)))
    unit = "the plan's" if planned else "that of the best peer without hindsight"
    counted = "those that can be held" if planned else "all"
    told = (
        f"Scenarios held, of {counted}; then the cost over {unit} on those, geometric mean and "
        "the bootstrap interval over scenarios (2.5 to 97.5 %). Means over different scenarios don't compare: look at "
        "how many were held first."
    )
    return f"{table(('policy', 'kind', *judged), lines)}\n\n{told}"


def _standing(item: Standing, planned: bool) -> str:
    held = f"{item.held}/{item.scenarios}"
    cost = item.cost_vs_plan if planned else item.cost_vs_best_peer
    if cost is None:
        return held
    mean, low, high = cost
    return f"{held}: {mean:.2f} ({low:.2f} to {high:.2f})"


def _learned(rows: Sequence[Row], scenarios: Sequence[Row], trained: Sequence[str]) -> list[str]:
    """What the learned policy costs beside the others, and where it misses."""
    found = head_to_heads(rows, scenarios, trained)
    if not found:
        return []
    told = (
        "The bill of the learned policy, as it ships, over that of the other, on the scenarios that both hold: "
        "geometric mean and bootstrap interval over scenarios (2.5 to 97.5 %); *tuned*: its first price of a miss is "
        "tuned on the train slice, as the others' settings are. First against the cheapest of a group *per scenario*, "
        "which nobody runs and nobody knows beforehand."
    )
    groups = [item for item in found if item.opponent in GROUPS]
    singles = [item for item in found if item.opponent not in GROUPS]
    parts = ["## The learned policy beside the others", told]
    apart = [part for part, has in PARTS.items() if 0 < sum(has(item, trained) for item in scenarios) < len(scenarios)]
    parts += [_head_to_heads(items, apart) for items in (groups, singles) if items]
    missed = [
        (
            item.scenario,
            f"{item.attainment:.1%} of {item.target:.0%}",
            "nobody" if item.opponent_cost is None else f"{item.opponent} at {item.opponent_cost:.2f} of its cost",
            "-" if item.plan_cost is None else f"{item.plan_cost:.2f}",
        )
        for item in misses(rows, scenarios)
    ]
    headings = ("missed by the learned policy", "attained", "cheapest that holds", "plan's cost over its")
    return [*parts, table(headings, missed)] if missed else parts


def _head_to_heads(found: Sequence[HeadToHead], parts: Sequence[str]) -> str:
    """All scenarios, then parts of them."""
    lines = []
    for item in found:
        costs = (item.cost, item.cost_tuned, *(item.by_part[part] for part in parts))
        lines.append((item.opponent, f"{item.held}", f"{item.both}", *map(shown_ratio, costs)))
    return table(("over", "it holds", "both hold", "cost", "cost, tuned", *parts), lines)


def _scenarios(scenarios: Sequence[Row], skipped: Sequence[Row]) -> str:
    lines = []
    for scenario in scenarios:
        slo = scenario["slo"]
        pools = "; ".join(
            f"{pool['max_replicas']} x {pool['engine']} at most, ${pool['usd_per_gpu_hour']:.2f} per GPU-hour, "
            f"{pool['price_class'].replace('_', '-')}, {pool['cold_start_s']:.0f} s to start"
            for pool in scenario["pools"]
        )
        promise = f"TTFT {slo['ttft_s']:g} s, TPOT {slo['tpot_s'] * 1000:g} ms, {slo['attainment']:.0%}"
        lines.append((scenario["name"], scenario["description"], promise, pools))
    lines += [(item["name"], f"skipped: {item['reason']}", "", "") for item in skipped]
    return table(("scenario", "what", "SLO", "pools"), lines)


def _tuning(tunings: Sequence[Row]) -> str:
    if not tunings:
        return (
            "Nothing was tuned in the run that this page shows: policies have their default settings. Without "
            "`TUNED=default` the command tunes them all."
        )
    runs = sum(item["trials"] for item in tunings)
    lines = [
        f"{len(tunings)} studies ran {runs:,} settings; only settings that were run count. "
        "An optimum on the edge of its range widened the range and was searched on.",
    ]
    edges = [item for item in tunings if item["edges"]]
    if edges:
        lines += ["", "Still on an edge after that, or at the end of what makes sense:", ""]
        lines += [
            f"- {item['scenario']}, {item['policy']} ({item['part']}): {', '.join(item['edges'])}" for item in edges
        ]
    else:
        lines.append("No optimum lies on an edge.")
    return "\n".join(lines)
