"""`jevons bundle`: keys, signatures and their check for policy bundles.

Importing this module must stay cheap: the work is imported inside the commands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Bundle = Annotated[str, typer.Argument(help="Policy bundle: a .zip file, or models:/NAME/VERSION.")]
Tracking = Annotated[str | None, typer.Option(help="MLflow tracking URI; MLFLOW_TRACKING_URI if unset.")]


def keys(private: Annotated[Path, typer.Argument(help="File for the private key; the public one gets .pub.")]) -> None:
    """Make a pair of Ed25519 keys: one to sign bundles with, one for `policy.trusted_keys`."""
    from autoscaler.versions.signatures import make_keys

    public = make_keys(private)
    typer.echo(f"wrote {private} (keep it secret) and {public}", err=True)


def sign(
    bundle: Bundle, key: Annotated[Path, typer.Option(help="Private key.")], tracking_uri: Tracking = None
) -> None:
    """Sign a bundle: a file's signature is written beside it, as BUNDLE.sig, a registered version's into its tag."""
    from autoscaler.versions.registry import sign_version
    from autoscaler.versions.signatures import sign_file
    from policies.lineup import REGISTRY_PREFIX

    if bundle.startswith(REGISTRY_PREFIX):
        typer.echo(f"signed {sign_version(bundle, tracking_uri, key)}", err=True)
    else:
        typer.echo(f"wrote {sign_file(Path(bundle), key)}", err=True)


def verify(
    bundle: Bundle,
    key: Annotated[list[Path], typer.Option(help="Public key that is trusted; repeatable.")],
    tracking_uri: Tracking = None,
) -> None:
    """Check a bundle and its signature as a controller with these keys does."""
    from autoscaler.versions.registry import verify_version
    from autoscaler.versions.signatures import Trust
    from policies.learned import load_bundle
    from policies.lineup import REGISTRY_PREFIX

    trust = Trust(key)
    if bundle.startswith(REGISTRY_PREFIX):
        found = verify_version(bundle, tracking_uri, trust)
    else:
        found = load_bundle(Path(bundle), trust.check_of(Path(bundle)))
    typer.echo(f"signed, digest {found.digest}")


COMMANDS: tuple[Callable[..., None], ...] = (keys, sign, verify)
"""What `jevons bundle` has."""
