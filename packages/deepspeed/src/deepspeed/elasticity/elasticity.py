"""`compute_elastic_config`: the batch of an elastic job, on ds_core.elasticity.

The original package had this until 0.18; programs that call it still run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ds_core.config import problems
from ds_core.elasticity import ElasticitySection
from ds_core.errors import ConfigError

#: What is raised for a section that contradicts itself, or a number of GPUs that does not suit.
ElasticityError = ElasticityConfigError = ElasticityIncompatibleWorldSize = ConfigError


def elasticity_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Whether a config asks for an elastic batch."""
    return bool((ds_config.get("elasticity") or {}).get("enabled", False))


def compute_elastic_config(
    ds_config: Mapping[str, Any],
    target_deepspeed_version: str | None = None,
    world_size: int = 0,
    return_microbatch: bool = False,
) -> tuple[Any, ...]:
    """The global batch of an elastic job, and the numbers of GPUs that suit it.

    Args:
        ds_config: with a section "elasticity".
        target_deepspeed_version: makes no difference.
        world_size: GPUs that have to suit; 0: any.
        return_microbatch: also return the micro-batch for `world_size`.

    Returns (batch, GPU counts), and the micro-batch where `world_size` is given and it is asked
    for (None for world_size 0).

    Raises ConfigError for a section that makes no sense, or a world_size that does not suit.
    """
    values = ds_config.get("elasticity")
    if not values:
        raise ConfigError('the config has no section "elasticity"; see docs/config.md')
    if not values.get("enabled", False):
        raise ConfigError("elasticity.enabled: got false, expected true")
    try:
        section = ElasticitySection.model_validate(values)
    except ValidationError as error:
        found = problems.translate(error, ElasticitySection, ("elasticity",))
        raise problems.fail(found, "the config") from None
    choice = section.choice()
    counts = list(choice.gpu_counts)
    if world_size > 0:
        triangle = section.triangle(world_size)
        if return_microbatch:
            return choice.train_batch_size, counts, triangle["train_micro_batch_size_per_gpu"]
    elif return_microbatch:
        return choice.train_batch_size, counts, None
    return choice.train_batch_size, counts


def ensure_immutable_elastic_config(runtime_elastic_config_dict: Mapping[str, Any]) -> None:
    """Makes no difference: the section is read once, from the config that the engine is given."""
