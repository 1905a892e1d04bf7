"""`jevons train --from`: tune a policy on a service's own trace, and promote it if it wins.

Importing this module must stay cheap: the work is imported inside the functions.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.commands.console import say, training_bars

if TYPE_CHECKING:
    from policies.spec import ScalingSpec
    from training.judging.evaluate import Evaluation
    from training.learning.seed_tasks import Where
    from training.learning.train import TrainedPolicy
    from training.learning.train_config import TrainConfig
    from training.versions.registry import Verdict


def fine_tune(
    recipe: TrainConfig, source: str, trace: Path, spec: Path | None, out: Path, resume: bool, where: Where
) -> tuple[Evaluation, Verdict]:
    """Tune `source` on a trace, judge both on its last part, register and promote the result if it wins.

    Args:
        recipe: of the learning.
        source: ``champion``, ``learned``, a bundle, the folder of a run, or ``models:/NAME@ALIAS``.
        trace: request log in any format that `jevons trace import` reads.
        spec: the service; that of `jevons what-if` when None.
        out: folder of the run.
        resume: go on with the run there.
        where: its seeds run.

    Raises:
        ConfigError: when the source is unknown, or the service cannot be tuned for.
        BundleMismatch: when the bundle cannot be used here.
        TraceError: when the trace cannot be used, or is too short.
    """
    from envs.cluster.warm_up import warm_up
    from policies.learned import load_bundle
    from training.learning.fine_tune import SOURCE_FILE, prepared
    from training.learning.seed_tasks import train_seeds
    from training.pages.results import show_evaluation

    kept = out / SOURCE_FILE
    bundle_file = kept if resume and kept.is_file() else find_bundle(source, recipe.name, recipe.tracking_uri)
    bundle = load_bundle(bundle_file)
    service = _service(spec, trace)
    config = prepared(recipe, source, bundle, trace, service)
    out.mkdir(parents=True, exist_ok=True)
    if bundle_file != kept:
        shutil.copyfile(bundle_file, kept)
    warm_up(say)
    with training_bars() as (tell, bar):
        best = train_seeds(config, out, resume, tell, bar, where)
        suite = held_out_suite(config)
        evaluation = _judge(suite, kept, best, lambda done, total, _: bar("judging", done, total))
    show_evaluation(evaluation)
    return evaluation, _settle(config, bundle.digest, best, evaluation, out)


def find_bundle(source: str, name: str, tracking_uri: str | None) -> Path:
    """The bundle that `--from` names.

    Raises:
        ConfigError: when there is no such policy.
        RegistryError: when the registry has no such version.
        FileNotFoundError: when a folder holds no finished run.
    """
    from autoscaler.versions.registry import BUNDLE_FILE
    from policies.engine import ConfigError
    from policies.lineup import REGISTRY_PREFIX, SHIPPED_BUNDLE
    from training.versions.registry import CHAMPION, resolve_bundle

    if source == CHAMPION:
        return resolve_bundle(f"{REGISTRY_PREFIX}{name}@{CHAMPION}", tracking_uri)
    if source.startswith(REGISTRY_PREFIX):
        return resolve_bundle(source, tracking_uri)
    if source == "learned":
        return SHIPPED_BUNDLE
    path = Path(source)
    if path.is_dir():
        from training.learning.export import finished
        from training.learning.monitor import RunState

        seeds = [folder for folder in (path, *sorted(path.glob("seed-*"))) if (folder / BUNDLE_FILE).is_file()]
        best = min(seeds, key=lambda folder: RunState.load(folder).best_score, default=path)
        return finished(best, BUNDLE_FILE)[0]
    if path.suffix == ".zip":
        return path
    raise ConfigError(
        f"--from {source}: expected {CHAMPION}, learned, a bundle that ends in .zip, the folder of a finished run, or "
        "models:/NAME@ALIAS"
    )


def _service(spec: Path | None, trace: Path) -> ScalingSpec:
    """The service of a file, or what `jevons what-if` assumes."""
    from policies.spec import load_spec

    if spec is not None:
        return load_spec(spec)
    from training.judging.what_if import default_scenario

    scenario = default_scenario(trace)
    pool = scenario.pools[0]
    say(
        f"note: no --spec: taken for {pool.engine.name}, at most {pool.max_replicas} replicas, TTFT "
        f"{scenario.slo.ttft_s:g} s and TPOT {scenario.slo.tpot_s * 1000:g} ms for {scenario.slo.attainment:.0%}"
    )
    return scenario.spec.model_copy(update={"service": trace.stem})


def held_out_suite(config: TrainConfig) -> Any:
    """The last part of the trace as a suite of one scenario."""
    from envs.traffic.formats import import_trace
    from training.learning.fine_tune import cut, cuts_s, started
    from training.replaying.scenarios import Scenario, Suite, TraceSource

    spec = config.fine_tune
    assert spec is not None
    assert spec.origin is not None
    trace = import_trace(spec.origin.trace).trace
    service = started(spec.origin.service, cut(spec, trace).held_out)
    window = service.interface.window
    scenario = Scenario(
        name=service.service,
        description=f"the last part of {trace.name}",
        trace=TraceSource(file=spec.origin.trace),
        slice=(cuts_s(spec, trace)[1], trace.duration_s),
        pools=service.pools,
        slo=service.slo,
        control_interval_s=window.control_interval_s,
        metrics_delay_s=window.metrics_delay_s,
        guardrails=service.guardrails,
        objective=service.objective,
        seeds=tuple(range(spec.judge_seeds)),
    )
    return Suite(name=f"held-out part of {trace.name}", scenarios=(scenario,))


def _judge(suite: Any, source: Path, best: TrainedPolicy, on_progress: Any) -> Evaluation:
    from training.judging.evaluate import evaluate

    return evaluate(suite, [str(source), str(best.bundle), "token-demand"], on_progress=on_progress)


def _settle(config: TrainConfig, source_digest: str, best: TrainedPolicy, evaluation: Evaluation, out: Path) -> Verdict:
    """Store the judgement; register and promote the tuned policy if it wins."""
    from training.pages.report import write_report
    from training.versions.registry import promote_over, register, store_judgement, versus
    from training.versions.tracking import connect

    client = connect(config.tracking_uri)
    found = evaluation.to_json()
    store_judgement(client, best.run_id, found, best.digest)
    write_report(evaluation, out / "report.html")
    client.log_artifact(best.run_id, str(out / "report.html"))
    verdict = versus(found, best.digest, source_digest)
    before, after = (
        next(row for row in found["by_scenario"] if row["policy"] == policy["policy"])
        for policy in found["policies"][:2]
    )
    print(f"before: {_words(before)}\nafter:  {_words(after)}")
    if not verdict.promote:
        print(f"not registered: {verdict.reasons[0]}")
        return verdict
    version = register(client, config.name, best.run_id, best.digest)
    promoted = promote_over(client, config.name, version, source_digest)
    print(f"{verdict.reasons[0]}\nregistered as version {version} of {config.name}, {promoted}")
    return verdict


def _words(row: dict[str, Any]) -> str:
    return (
        f"{row['attainment']:.2%} within the SLO{'' if row['holds_slo'] else ' (misses it)'}, "
        f"${row['usd_per_good_mtok']:.4f} per million good tokens, {row['replica_hours']:.1f} replica-hours"
    )
