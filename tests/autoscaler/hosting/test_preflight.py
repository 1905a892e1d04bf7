"""What `jevons check` says of the host itself."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.authority.leases import DatabaseLeases
from autoscaler.hosting.preflight import check_host


def test_leases_without_a_kubeconfig_are_one_line(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    lease = {"kind": "kubernetes", "connection": {"kubeconfig": str(tmp_path / "nowhere.yaml")}}
    lines = check_host(live_config(tmp_path, name="test", lease=lease), world)
    (wrong,) = (line for line in lines if not line.ok)
    assert wrong.subject == "test"
    assert "kubeconfig" in wrong.detail


def test_the_connection_of_the_leases_is_closed_after_a_check_and_after_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[DatabaseLeases] = []
    monkeypatch.setattr(DatabaseLeases, "close", lambda self: closed.append(self))
    world, config = LiveWorld([service_spec()], [burst()]), live_config(tmp_path)
    check_host(config, world)
    assert len(closed) == 1
    service = world.service(config)
    service.close()
    assert closed[1:] == [service.leases]


def test_a_port_is_ours_only_where_this_configuration_runs(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = world.service(live_config(tmp_path / "ours", exposition={"port": port}))
    world.run(service, 1)

    def said(folder: str) -> tuple[bool, str]:
        config = live_config(tmp_path / folder, exposition={"port": port})
        (line,) = (line for line in check_host(config, None) if line.subject.startswith("port "))
        return line.ok, line.detail

    assert said("ours") == (True, "this configuration's controller serves there already")
    ok, detail = said("theirs")
    assert (ok, detail.startswith("another configuration's controller serves there: ")) == (False, True)
    service.close()


def test_a_folder_that_may_not_be_looked_at_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    config = live_config(tmp_path)
    monkeypatch.setattr(Path, "exists", refused)
    lines = [line for line in check_host(config, None) if line.subject.startswith("policy.cache")]
    assert [(line.ok, line.detail) for line in lines] == [(False, "it cannot be looked at: Permission denied")]
