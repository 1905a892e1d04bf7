"""How fast one replica is: the engine profile.

A profile is a YAML file (see ``configs/engines/``).
The cluster model (``envs``) computes with it, and the decision core divides by the capacity that it predicts, so that
a policy sees every model and GPU on the same scale.
This module must not know about clusters, traffic or prices over time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policies.names import Name, Title
from policies.redaction import SECRET_FIELD, redacted, redacted_url
from policies.yaml_text import MAX_BYTES, YamlRefused, parse_yaml

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """Raised when a configuration file cannot be used; the message names the file, the field and what was expected."""


class StrictModel(BaseModel):
    """Base of every config model: immutable, and an unknown key is an error rather than silently dropped."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StepModel(StrictModel):
    """Time of one engine iteration: ``a + b*p + c*B + d*KV + e*p*(prefix + p/2)``.

    ``p``: prefill tokens processed in the iteration; ``B``: sequences decoded; ``KV``: tokens of context that the
    decodes read; ``prefix``: tokens of the sequence already cached before the prefill chunk.
    The form and its accuracy are discussed in ``docs/cluster_model.md``.
    """

    a_ms: Positive = Field(description="Fixed time of an iteration, milliseconds.")
    b_us_per_prefill_token: NonNegative = Field(description="Microseconds per prefill token.")
    c_us_per_seq: NonNegative = Field(description="Microseconds per decoded sequence.")
    d_us_per_1k_kv_tokens: NonNegative = Field(description="Microseconds per 1,000 context tokens read by decodes.")
    e_ns_per_prefill_token2: NonNegative = Field(description="Nanoseconds per squared prefill token (attention).")

    @property
    def seconds(self) -> tuple[float, float, float, float, float]:
        """The coefficients (a, b, c, d, e) in seconds per unit."""
        return (
            self.a_ms * 1e-3,
            self.b_us_per_prefill_token * 1e-6,
            self.c_us_per_seq * 1e-6,
            self.d_us_per_1k_kv_tokens * 1e-9,
            self.e_ns_per_prefill_token2 * 1e-9,
        )


class ColdStart(StrictModel):
    """Stages from the request for a replica to its first request served, seconds at full speed."""

    node_s: NonNegative = Field(description="Granting of a node (0 when a free slot exists), seconds.")
    image_s: NonNegative = Field(description="Pull of the container image, seconds.")
    weights_s: NonNegative = Field(description="Load of the weights with the storage to itself, seconds.")
    warmup_s: NonNegative = Field(description="Compilation, graph capture and health checks, seconds.")

    @property
    def total_s(self) -> float:
        """Sum of the stages, seconds."""
        return self.node_s + self.image_s + self.weights_s + self.warmup_s


class EngineProfile(StrictModel):
    """Speed, memory, limits, cold start and default price of one replica of a model on a GPU type."""

    name: Name = Field(description="Unique name, as used in suites and specs.")
    model: Title = Field(description="Model served.")
    gpu: Title = Field(description="GPU type.")
    backend: Title = Field(description="Inference engine the step times were taken from.")
    precision: Title = Field(description="Weight precision.")
    gpus_per_replica: int = Field(ge=1, description="GPUs that one replica occupies (tensor parallel size).")
    gpus_per_node: int = Field(ge=1, description="GPUs of one node of this type.")
    step: StepModel = Field(description="Iteration time coefficients.")
    kv_capacity_tokens: int = Field(ge=16, description="KV cache capacity of one replica, tokens.")
    max_num_seqs: int = Field(ge=1, le=4096, description="Largest batch that the engine admits; bounds the batch cap.")
    max_num_batched_tokens: int = Field(ge=16, description="Token budget of one iteration.")
    cold_start: ColdStart = Field(description="Stages of a replica's start.")
    usd_per_gpu_hour: Positive = Field(description="Default on-demand price, dollars per GPU-hour.")
    fitted_on: str = Field(min_length=1, description="The data that the coefficients were fitted on, in words.")


def read_yaml(path: Path) -> object:
    """Read one YAML document.

    Raises:
        ConfigError: when the file is missing, is not YAML, or is not within the bounds of `policies.yaml_text`.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        return parse_yaml(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, expected a YAML file") from None
    except YamlRefused as error:
        raise ConfigError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # no UTF-8, or no path
        raise ConfigError(f"{path!s:.200}: cannot be read: {error!s:.200}") from None


def load_model(path: Path, model: type[Model]) -> Model:
    """Read a YAML file into a config model.

    Raises:
        ConfigError: with the file, the first offending field and what was expected.
    """
    return parse_model(read_yaml(path), model, str(path))


def parse_model(data: object, model: type[Model], where: str) -> Model:
    """Validate already-parsed YAML; `where` names the source in the error.

    Raises:
        ConfigError: with the source, the first offending field and what was expected.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A name that nobody knows comes first: a slip of the pen also makes the right name a missing one.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        field = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        message = first["msg"].removeprefix("Value error, ")
        # What was put where it does not belong may be a secret, such as a password instead of the name of its file.
        given = first["input"]
        given = redacted_url(given) if isinstance(given, str) else given
        shown = isinstance(given, str | int | float) and not SECRET_FIELD.search(field)
        got = f", got {redacted(repr(given)):.80}" if shown else ""
        raise ConfigError(f"{where}: field {field}: {message}{got}{more}") from None


def load_engine(path: Path) -> EngineProfile:
    """Read an engine profile.

    Raises:
        ConfigError: when the file is missing or a field is wrong.
    """
    return load_model(path, EngineProfile)
