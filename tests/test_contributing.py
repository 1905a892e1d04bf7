"""The lines of CONTRIBUTING under "Add something", followed."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer
from typer.testing import CliRunner
from worlds import chat

import autoscaler.actuators
import policies.baselines
from autoscaler.actuators.base import LiveActuator
from autoscaler.actuators.build import ActuatorConfig
from envs.traffic.formats import FORMATS, LogFormat, import_trace
from policies import lineup
from policies.baselines.parameters import TunablePolicy
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.contract import Bools, Floats, Observation
from policies.engine import StrictModel
from training.commands import pages
from training.judging.scenario_runs import run_scenario
from training.pages.tables import table

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = TEXT[TEXT.index("## Add something") : TEXT.index("## House style")]
KINDS = ("policy", "actuator", "trace format", "page")


def modules_of(package: Any) -> list[Any]:
    return [
        importlib.import_module(f"{package.__name__}.{item.name}") for item in pkgutil.iter_modules(package.__path__)
    ]


def defined_in(module: Any, base: type) -> list[type]:
    """Classes of a module that are a kind of `base`, those it only imports left out."""
    found = [item for _, item in inspect.getmembers(module, inspect.isclass) if item.__module__ == module.__name__]
    return [item for item in found if issubclass(item, base)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_in_two_sentences_that_begin_lines(kind: str) -> None:
    (entry,) = re.findall(rf"^- \*\*An? {kind}:\*\* (.*?)(?=^- |\Z)", SECTION, flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"[.]\s*(?=\n|\Z)", entry.strip())) == 2, entry


def test_every_place_that_is_named_exists() -> None:
    missing = []
    for name in re.findall(r"`([\w./-]+)`", SECTION):
        if "/" in name or name == "Makefile":
            found = (ROOT / name).exists()
        elif "." in name:
            module, _, attribute = name.rpartition(".")
            try:
                found = hasattr(importlib.import_module(module), attribute)
            except ModuleNotFoundError:
                found = importlib.import_module(name) is not None
        else:
            continue
        if not found:
            missing.append(name)
    assert missing == []


class TwoReplicas(SinglePoolPolicy):
    """Always two."""

    name = "two-replicas"

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        return np.full(len(service.current), 2.0)

    def forget(self, rows: Bools) -> None:
        pass


def test_a_policy_in_the_baselines_is_judged_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lineup.BASELINES, TwoReplicas.name, TwoReplicas)
    run = run_scenario(chat(), lineup.resolve("two-replicas:spot_share=0.2"))
    assert {score.policy for score in run.scores} == {"two-replicas:spot_share=0.2"}
    assert run.timeline.target[-1].tolist() == [2]


def test_every_policy_of_the_baselines_folder_is_in_the_lineup() -> None:
    named = {
        item
        for module in modules_of(policies.baselines)
        for item in defined_in(module, object)
        if getattr(item, "PARAMETERS", None) is not None and getattr(item, "name", "") and hasattr(item, "propose")
    }
    assert named - {TunablePolicy} == set(lineup.BASELINES.values())


def test_every_actuator_is_configured_built_and_held_to_the_contract() -> None:
    configs = {
        item.model_fields["kind"].default: item
        for module in modules_of(autoscaler.actuators)
        for item in defined_in(module, StrictModel)
        if "kind" in item.model_fields
    }
    union, _ = get_args(ActuatorConfig)
    assert set(get_args(union)) == set(configs.values())
    build = (ROOT / "autoscaler" / "actuators" / "build.py").read_text(encoding="utf-8")
    suite = (ROOT / "tests" / "integration" / "test_actuator_contract.py").read_text(encoding="utf-8")
    assert [kind for kind, item in configs.items() if f"case {item.__name__}():" not in build] == []
    assert [kind for kind in configs if f'"{kind}"' not in suite] == []
    methods = {name for name in vars(LiveActuator) if not name.startswith("_")}
    classes = [
        item
        for module in modules_of(autoscaler.actuators)
        for item in defined_in(module, object)
        if item.__name__.endswith("Actuator") and item is not LiveActuator
    ]
    assert len(classes) == len(configs)
    assert {item.__name__: methods - set(dir(item)) for item in classes} == {item.__name__: set() for item in classes}


def test_a_row_of_the_formats_is_recognised_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"arrival_s": "when", "prompt_tokens": "tokens in", "output_tokens": "tokens out"}
    monkeypatch.setitem(FORMATS, "mine", LogFormat(columns, marks=("made by",)))
    log = tmp_path / "log.csv"
    log.write_text("when,tokens in,tokens out,made by\n3.0,10,2,me\n1.0,20,4,me\n")
    found = import_trace(log)
    assert found.format == "mine"
    assert found.trace.arrival_s.tolist() == [0.0, 2.0]
    assert (found.trace.prompt_tokens.tolist(), found.trace.output_tokens.tolist()) == ([20, 10], [4, 2])


def test_a_page_is_a_function_and_a_command_that_writes_what_it_returns(tmp_path: Path) -> None:
    def mine(page: Path) -> None:
        pages._write(page, table(("policy", "held"), [("hpa", "3/4")]))

    app = typer.Typer()
    app.command()(mine)
    app.command("other")(pages.peers)
    result = CliRunner().invoke(app, ["mine", str(tmp_path / "mine.md")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mine.md").read_text() == "| policy | held |\n|---|---|\n| hpa | 3/4 |"


def test_every_page_command_is_called_by_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = {(item.name or item.callback.__name__).replace("_", "-") for item in pages.app.registered_commands}
    called = set(re.findall(r"-m training\.commands\.pages ([a-z-]+)", makefile))
    assert names - {"recipe"} == called  # the model card says how to call that one


def test_every_page_is_imported_by_a_command_or_by_another_page() -> None:
    files = [file for wing in ("commands", "pages") for file in (ROOT / "training" / wing).glob("*.py")]
    sources = "\n".join(file.read_text(encoding="utf-8") for file in files)
    unused = [
        file.stem
        for file in (ROOT / "training" / "pages").glob("*.py")
        if file.stem != "__init__" and f"training.pages.{file.stem} import" not in sources
    ]
    assert unused == []
