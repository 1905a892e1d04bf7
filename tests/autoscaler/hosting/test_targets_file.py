from __future__ import annotations

import json
from pathlib import Path

from live_fakes import LiveWorld, burst, live_config, service_spec


def test_the_targets_in_force_are_published_in_a_folder_that_was_not_there(tmp_path: Path) -> None:
    path = tmp_path / "serve" / "targets.json"
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, targets_file=path))
    world.run(service, 3)
    service.close()
    published = next(iter(json.loads(path.read_text())["chat"].values()))
    assert published["replicas"] == world.targets[-1].replicas[0, 0]
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_told_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "serve").touch()
    path = tmp_path / "serve" / "targets.json"
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, targets_file=path))
    world.run(service, 3)
    service.close()
    assert service.targets.problem == f"{path}: cannot be written: Not a directory"
    assert len(world.targets) == 3
