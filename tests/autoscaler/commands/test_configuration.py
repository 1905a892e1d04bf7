"""The live configuration as an option: one and the same in every command that takes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError
from training.commands.main import app


def commands(command: click.Command, name: str = "jevons") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    for word, one in getattr(command, "commands", {}).items():
        yield from commands(one, f"{name} {word}")


def test_every_command_on_a_live_configuration_takes_it_from_the_environment() -> None:
    options = {
        name: option
        for name, command in commands(get_command(app))
        for option in command.params
        if "--config" in option.opts and "Live configuration" in (getattr(option, "help", "") or "")
    }
    assert {"jevons check", "jevons record", "jevons run", "jevons status", "jevons explain"} <= set(options)
    assert {name for name, option in options.items() if option.envvar != "JEVONS_CONFIG"} == set()


@pytest.mark.parametrize("words", [["check"], ["record", "--out", "x.parquet"], ["status"]])
def test_a_configuration_of_the_environment_is_read(words: list[str], tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, words, env={"JEVONS_CONFIG": str(tmp_path / "mine.yaml")})
    assert "mine.yaml" in f"{answer.output}{answer.exception}"


def test_a_missing_kubeconfig_is_said_with_the_field_that_names_one(tmp_path: Path) -> None:
    with pytest.raises(KubeError, match=r"none\.yaml: .*connection: \{kubeconfig: PATH\}"):
        KubeApi(KubeConnection(kubeconfig=tmp_path / "none.yaml"))
