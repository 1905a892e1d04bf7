"""The keys of a live configuration and of a scaling spec in ``docs/live_configuration.md``, from their models."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from autoscaler.actuators.build import CompositeConfig
from autoscaler.hosting.config import LiveConfig
from policies.engine import EngineProfile
from training.pages.tables import table

ELSEWHERE = (EngineProfile,)
"""Models that have files and a page of their own."""


class Place(NamedTuple):
    """Where a part may stand."""

    path: str
    kind: str

    def __str__(self) -> str:
        return f"`{self.path}`" * bool(self.path) + f" of kind `{self.kind}`" * bool(self.kind)


def keys(root: type[BaseModel] = LiveConfig) -> str:
    """Markdown: a table for the file itself, and one for each part of it, under all places where it may stand.

    Raises:
        ValueError: when a field has no description.
    """
    places: dict[type[BaseModel], list[Place]] = {root: [Place("", "")]}
    waiting = [root]
    while waiting:
        model = waiting.pop(0)
        at = places[model][0]
        for name, field in model.model_fields.items():
            for part in _parts(field.annotation):
                if part not in places:
                    waiting.append(part)
                elif model is CompositeConfig:
                    continue  # its parts are actuators like any other
                place = Place(f"{at.path}.{name}".lstrip("."), at.kind or _kind(part, field))
                places.setdefault(part, []).append(place)
    parts = []
    for model, where in places.items():
        heading = ", ".join(dict.fromkeys(map(str, where))) or "The file"
        rows = [_row(model, name, field) for name, field in model.model_fields.items()]
        parts += [f"### {heading}", _sentence(model.__doc__ or ""), table(("key", "default", "meaning"), rows)]
    return "\n\n".join(part for part in parts if part)


def _parts(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation in ELSEWHERE else [annotation]
    return [part for inside in get_args(annotation) if not isinstance(inside, str) for part in _parts(inside)]


def _kind(part: type[BaseModel], field: FieldInfo) -> str:
    """What tells a part from the others that may stand in its place; empty where there is but one."""
    return str(part.model_fields["kind"].default) if field.discriminator or len(_parts(field.annotation)) > 1 else ""


def _row(model: type[BaseModel], name: str, field: FieldInfo) -> tuple[str, str, str]:
    if not field.description:
        raise ValueError(f"{model.__name__}.{name}: expected a description, for docs/live_configuration.md")
    meaning = _sentence(field.description)
    choices = _choices(field.annotation)
    if len(choices) > 1:
        meaning += f" One of {', '.join(f'`{one}`' for one in choices)}."
    return f"`{name}`", _default(field), meaning


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(one) for one in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(one.value) for one in annotation]
    return []


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "as in its table"
    plain = to_jsonable_python(value, fallback=str)
    if plain is None or plain in ("", [], {}):
        return ""
    if isinstance(plain, dict):
        return ", ".join(f"`{key}: {one}`" for key, one in plain.items())
    if isinstance(plain, list):
        return ", ".join(f"`{one}`" for one in plain)
    if isinstance(plain, float):
        plain = f"{plain:g}"
    return f"`{str(plain).lower() if isinstance(plain, bool) else plain}`"


def _sentence(text: str) -> str:
    """The first paragraph in one line, as a cell of a table takes it."""
    return " ".join(text.partition("\n\n")[0].split()).replace("``", "`").replace("|", "\\|")
