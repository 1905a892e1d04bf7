"""What `docs/peers.md` says of each baseline, from the docstrings and parameter tables."""

from __future__ import annotations

import inspect
from types import ModuleType

from policies.baselines.parameters import Parameter, TunablePolicy
from policies.lineup import BASELINES
from training.pages.tables import table


def page() -> str:
    """One section a module, one table a policy, in the order of the registry."""
    lines: list[str] = []
    described: set[str] = set()
    for name, policy in BASELINES.items():
        module = inspect.getmodule(policy)
        assert module is not None
        if module.__name__ not in described:
            described.add(module.__name__)
            lines += _section(module)
        lines += ["", f"**`{name}`**: {_about(policy)}", "", _table(policy.PARAMETERS)]
    return "\n".join(lines).strip()


def _section(module: ModuleType) -> list[str]:
    title, _, rest = inspect.getdoc(module).partition("\n")  # type: ignore[union-attr]
    told = ["", _markdown(rest.strip())] if rest.strip() else []
    return ["", f"### {_markdown(title).rstrip('.')}", *told]


def _about(policy: type[TunablePolicy]) -> str:
    text = inspect.getdoc(policy) or ""
    return _markdown(text.partition("\n\nArgs:")[0])


def _markdown(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _table(parameters: tuple[Parameter, ...]) -> str:
    rows = []
    for item in parameters:
        if item.choices:
            searched = ", ".join(item.choices)
        else:
            searched = f"{item.low:g} to {item.high:g}{', log' if item.log else ''}"
        default = item.default if isinstance(item.default, str) else f"{item.default:g}"
        rows.append((f"`{item.name}`", default, searched, item.meaning))
    return table(("parameter", "default", "searched", "meaning"), rows)
