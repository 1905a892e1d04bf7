"""The text of ``docs/model_card.md`` from a bundle's manifest and the evaluations that judged it.

Nothing that the bundle or an evaluation knows is typed by hand, so the page stays true when the bundle is replaced.
This module must not know how the policy was trained or judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from policies.learned import PolicyBundle
from policies.lineup import is_peer, is_rule
from training.judging.scenario_runs import DEFAULT, label
from training.judging.standings import WITHOUT_FORESIGHT, Standing, add_ratios, best_peer, cheapest, standings_of
from training.learning.train_config import TrainConfig
from training.pages.tables import shown_ratio, table

Row = dict[str, Any]
LEARNED = "learned"
PICTURES = {"images/burst.svg": "In a burst", "images/learning.svg": "Learning"}
"""What `make pictures` draws, beside the page, and the headings."""
SHOWN = 12
"""Digests of training traces that are printed; the manifest has them all."""


def card(bundle: PolicyBundle, name: str, evaluations: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """The whole page, Markdown.

    Args:
        bundle: the policy.
        name: path of the bundle as a reader of the page would type it.
        evaluations: the JSON of `jevons evaluate --details`, one per suite, each with the policy ``learned``.
        pictures: of `PICTURES`, those that there are.

    Raises:
        ValueError: when an evaluation judged another bundle, or none.
    """
    for found in evaluations:
        digests = {item["policy"]: item["bundle_digest"] for item in found["policies"]}
        if digests.get(LEARNED) != bundle.digest:
            judged = (digests.get(LEARNED) or "no learned policy")[:12]
            raise ValueError(
                f"suite {found['suite']!r} judged {judged}, but {name} is {bundle.digest[:12]}: judge again"
            )
        for scenario in found["scenarios"]:
            add_ratios(_of(found, scenario))
    parts = [
        "# Model card",
        f"The learned policy in `{name}`: a network that reads {len(bundle.manifest.features)} features of one service "
        f"and answers with {len(bundle.manifest.actions)} outputs, {_words(bundle.manifest.actions)}, from which "
        "replicas and batch caps of every pool follow ([architecture.md](architecture.md)). "
        "`make model-card` writes this page from the bundle and from evaluations of it.",
        "## What it is",
        _identity(bundle),
        "## What it was trained on",
        "The configuration of the run, as the bundle holds it.",
        _config(bundle.manifest.provenance.get("config", {})),
        _traces(bundle.manifest.provenance.get("trace_digests", [])),
        "## Interface",
        _interface(bundle),
        "## Results",
        *(part for found in evaluations for part in _results(found)),
        *(part for file in pictures for part in (f"## {PICTURES[file]}", f"![{PICTURES[file]}]({file})")),
        "## Limits",
        _limits(evaluations),
        "## Train it again",
        _again(bundle, name),
        "---",
        f"Written by `make model-card`; {_versions(evaluations)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _identity(bundle: PolicyBundle) -> str:
    known = bundle.manifest.provenance
    figures: Row = {
        "digest": bundle.digest,
        **{key: value for key, value in known.items() if not isinstance(value, dict | list)},
        **{f"validation: {key}": value for key, value in known.get("validation", {}).items()},
        "bytes of weights": len(bundle.weights),
    }
    return table(("", ""), ((key.replace("_", " "), _plain(value)) for key, value in figures.items()))


def _config(config: Row) -> str:
    rows = ((f"`{path}`", _plain(value), meaning(path)) for path, value in flat(config))
    return table(("field", "value", "meaning"), rows)


def meaning(path: str) -> str:
    """What a field of a training configuration means, by its dotted path; empty for one that there is no longer.

    >>> meaning("worlds.traces"), meaning("worlds.profiles.chat") == meaning("worlds.profiles"), meaning("no.such")
    ('Traces generated.', True, '')
    """
    model: Any = TrainConfig
    told = ""
    for name in path.split("."):
        fields = getattr(model, "model_fields", {})
        if name not in fields:
            break
        told = fields[name].description or ""
        kinds = (fields[name].annotation, *get_args(fields[name].annotation))
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return told


def flat(config: Row, above: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (dotted path, value) of a nested mapping.

    >>> list(flat({"a": {"b": 1, "c": [2, 3]}}))
    [('a.b', 1), ('a.c', [2, 3])]
    """
    for key, value in config.items():
        path = f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from flat(value, f"{path}.")
        else:
            yield path, value


def _traces(digests: Sequence[str]) -> str:
    if not digests:
        return ""
    more = f" and {len(digests) - SHOWN} more in the manifest" if len(digests) > SHOWN else ""
    return f"{len(digests)} traces, by digest: {', '.join(digest[:12] for digest in digests[:SHOWN])}{more}."


def _interface(bundle: PolicyBundle) -> str:
    manifest = bundle.manifest
    window, action = manifest.interface.window, manifest.interface.action
    told = (
        f"A decision every {window.control_interval_s:g} s on metrics that are {window.metrics_delay_s:g} s old; a "
        f"service with others is refused (interface {manifest.interface_digest[:12]}). The dial, log of the price of a "
        f"miss, stands at {manifest.log_miss_price:.2f} and moves by {manifest.log_miss_price_span:g} either way. "
        f"What the outputs mean: {_words(f'{key} {value}' for key, value in action.model_dump().items())}."
    )
    rows = zip(manifest.features, manifest.feature_low, manifest.feature_high, strict=True)
    ranges = table(
        ("feature", "lowest in training", "highest"), ((f"`{a}`", f"{b:.3g}", f"{c:.3g}") for a, b, c in rows)
    )
    return f"{told}\n\nThe live controller leaves the policy where a feature is far outside its range.\n\n{ranges}"


def _results(found: Row) -> Iterator[str]:
    """Suite by suite: each scenario beside the best peer and rule, and how many scenarios each policy held."""
    yield f"### Suite `{found['suite']}`"
    yield table(
        (
            "scenario",
            "SLO met",
            "target",
            "$ / M tokens",
            "over the plan",
            "scale events per hour",
            "best peer",
            "best own rule",
        ),
        (_scenario(_of(found, scenario), scenario) for scenario in found["scenarios"]),
    )
    yield (
        "`*`: misses the SLO, so its cost says nothing. Best peer and own rule: the cheapest that holds the SLO "
        "without hindsight, and its cost over that of the learned policy."
    )
    for source in ("generated", "real"):
        best: dict[str, Standing] = {}
        for item in standings_of(found["by_scenario"], found["scenarios"], source):
            named = item.policy == LEARNED or is_peer(item.policy) or is_rule(item.policy)
            if named and item.scenarios and item.tuned in WITHOUT_FORESIGHT:
                best.setdefault(item.policy, item)  # the best come first
        rows = [
            (
                label(item.policy, item.tuned),
                f"{item.held}/{item.scenarios}",
                shown_ratio(item.cost_vs_plan),
                shown_ratio(item.cost_vs_best_peer),
            )
            for item in best.values()
        ]
        if rows:
            yield f"Every policy with its best settings that need no hindsight, {source} traffic:"
            yield table(("policy", "held", "cost over the plan", "over the best peer"), rows)
    if found["skipped"]:
        yield f"Not run: {_words(item['name'] for item in found['skipped'])}."


def _scenario(rows: Sequence[Row], scenario: Row) -> tuple[str, ...]:
    own = next(row for row in rows if row["policy"] == LEARNED and row["tuned"] == DEFAULT)
    rule = cheapest(row for row in rows if is_rule(row["policy"]) and row["tuned"] in WITHOUT_FORESIGHT)
    return (
        scenario["name"],
        f"{own['attainment']:.2%}{'' if own['holds_slo'] else ' *'}",
        f"{scenario['slo']['attainment']:.0%}",
        f"{own['usd_per_mtok']:.4f}",
        "-" if own["cost_vs_plan"] is None else f"{own['cost_vs_plan']:.2f}",
        f"{own['scale_events_per_hour']:.1f}",
        *(
            "none" if other is None else f"{label(other['policy'], other['tuned'])}: {_over(other, own)}"
            for other in (best_peer(rows), rule)
        ),
    )


def _over(other: Row, own: Row) -> str:
    return f"{other['usd'] / own['usd']:.2f}" if own["holds_slo"] else "holds"


def _limits(evaluations: Sequence[Row]) -> str:
    lines = [
        "- All figures are from the cluster model; [fidelity.md](fidelity.md) says how far that is from measured GPUs.",
        "- [robustness.md](robustness.md) has what it does under wrong profiles, late or missing metrics and storms.",
    ]
    for found in evaluations:
        rows = {
            row["scenario"]: row for row in found["by_scenario"] if row["policy"] == LEARNED and row["tuned"] == DEFAULT
        }
        missed = [name for name, row in rows.items() if not row["holds_slo"]]
        unservable = {scenario["name"] for scenario in found["scenarios"] if scenario["servable"] is False}
        if missed:
            told = "; ".join(f"{name} (nobody can)" if name in unservable else name for name in missed)
            lines.append(f"- On suite `{found['suite']}` it misses the SLO of: {told}.")
        else:
            lines.append(f"- On suite `{found['suite']}` it holds every SLO.")
        dearer = [
            scenario["name"]
            for scenario in found["scenarios"]
            for row, peer in [(rows[scenario["name"]], best_peer(_of(found, scenario)))]
            if row["holds_slo"] and peer is not None and peer["usd"] < row["usd"]
        ]
        if dearer:
            lines.append(f"- There a peer is cheaper on: {'; '.join(dearer)}.")
    return "\n".join(lines)


def _again(bundle: PolicyBundle, name: str) -> str:
    known = bundle.manifest.provenance
    version, _, commit = known.get("code_version", "").partition("+")
    at = f" at commit {commit.removesuffix('-dirty')}" if commit else ""
    return (
        f"With Jevons {version}{at}; this writes the configuration of the run as the bundle holds it, and trains.\n\n"
        "```sh\n"
        f"python -m training.commands.pages recipe --bundle {name} > recipe.yaml && "
        f"jevons train --config recipe.yaml --seed {known.get('seed', 0)} --out runs/again\n"
        "```"
    )


def _of(found: Row, scenario: Row) -> list[Row]:
    return [row for row in found["by_scenario"] if row["scenario"] == scenario["name"]]


def _versions(evaluations: Sequence[Row]) -> str:
    versions = evaluations[0]["versions"] if evaluations else {}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _words(items: Any) -> str:
    return ", ".join(str(item).replace("_", " ") for item in items)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value) or "none"
    return "none" if value is None or value == {} else str(value)
