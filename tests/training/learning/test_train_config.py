import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from policies.engine import ConfigError
from policies.spec import shipped_configs
from training.learning.train_config import TrainConfig, load_train_config


def models_in(annotation: Any) -> set[type[BaseModel]]:
    """Config models that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in models_in(part)}


def all_models(root: type[BaseModel]) -> set[type[BaseModel]]:
    found, left = {root}, [root]
    while left:
        for field in left.pop().model_fields.values():
            new = models_in(field.annotation) - found
            found |= new
            left += new
    return found


def written(folder: Path, data: object) -> Path:
    path = folder / "train.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def test_every_field_says_what_it_is() -> None:
    models = all_models(TrainConfig)
    assert len(models) >= 10
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert field.description.endswith("."), f"{model.__name__}.{name}"


def test_the_shipped_recipe_loads_and_means_what_it_says() -> None:
    path = shipped_configs() / "train.yaml"
    config = load_train_config(path)
    raw = yaml.safe_load(path.read_text())
    resolved = config.model_dump(mode="json")
    for name, value in raw.items():
        if isinstance(value, dict):
            assert {key: resolved[name][key] for key in value} == value
        else:
            assert resolved[name] == value


def test_an_empty_mapping_is_the_default_recipe(tmp_path: Path) -> None:
    assert load_train_config(written(tmp_path, {})) == TrainConfig()


def test_a_resolved_configuration_loads_to_itself(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {
            "seeds": [3, 1],
            "suite": "smoke",
            "warm_start": None,
            "ppo": {"num_envs": 4, "batch_size": 64, "hidden": [7], "target_kl": None, "learning_rate": 1e-5},
            "worlds": {"profiles": {"chat": 2.0}, "mean_replicas": [1, 2]},
        }
    )
    assert load_train_config(written(tmp_path, config.model_dump(mode="json"))) == config


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"total_step": 5}, "field total_step"),
        ({"total_steps": 0}, "field total_steps"),
        ({"seeds": []}, "field seeds"),
        ({"seeds": [-1]}, "field seeds.0"),
        ({"seeds": [1, 1]}, "given once"),
        ({"train_share": 1.5}, "field train_share"),
        ({"ppo": {"batch_size": 1000}}, "batch_size 1000 must divide"),
        ({"ppo": {"hidden": [64, 0]}}, "field ppo.hidden.1"),
        ({"ppo": {"learning_rate": float("nan")}}, "field ppo.learning_rate"),
        ({"episodes": {"usual_miss_rate": -1}}, "field episodes.usual_miss_rate"),
        ({"worlds": {"mean_replicas": [5, 1]}}, "mean_replicas"),
        ({"worlds": {"profiles": {"chats": 1.0}}}, "field worlds.profiles.chats"),
        ({"objective": {"miss_price": 0}}, "miss_price must be above 0"),
        ({"validation": None}, "field validation"),
        ("ppo: [", "not valid YAML"),
        ("just words", "(whole file)"),
    ],
)
def test_a_wrong_configuration_is_refused_by_file_and_field(tmp_path: Path, data: object, expected: str) -> None:
    path = written(tmp_path, data)
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        load_train_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_train_config(tmp_path / "absent.yaml")
