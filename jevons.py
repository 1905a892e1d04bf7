"""The ``jevons`` command. First it makes sure that the packages it is about to import are its own.

They bear plain names (`policies`, `envs`, `autoscaler`, `training`), which other code may bear too; see
``docs/decisions/0006-import-names.md``. Also run as ``python -m jevons``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("policies", "envs", "autoscaler", "training")


def foreign_packages() -> dict[str, str]:
    """The packages that are not the ones beside this file, and where they are found instead."""
    own = Path(__file__).parent  # not resolved: an installer may link files and make folders of its own
    found = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [Path(place).resolve() for place in spec.submodule_search_locations or ()]
        if (own / name).resolve() not in places:
            found[name] = str(places[0]) if places else "nowhere"
    return found


def main() -> None:
    """Run the command line, or say in one sentence why its packages cannot be imported."""
    for name, place in foreign_packages().items():
        sys.stderr.write(
            f"error: Jevons needs its own package {name!r}, but Python finds {place}: another project's {name!r} comes "
            "first on the import path; install Jevons in an environment of its own, and leave that folder out of "
            "PYTHONPATH\n"
        )
        sys.exit(2)
    from policies.redaction import guard_streams
    from training.commands.main import app

    guard_streams()
    app()


if __name__ == "__main__":
    main()
