"""One global batch for many cluster sizes, on ds_core.elasticity."""

from __future__ import annotations

from deepspeed._names import names_of

_ELASTIC = "deepspeed.elasticity.elasticity"

__getattr__, __dir__ = names_of(
    __name__,
    {
        name: f"{_ELASTIC}:{name}"
        for name in (
            *("compute_elastic_config", "elasticity_enabled", "ensure_immutable_elastic_config"),
            *("ElasticityError", "ElasticityConfigError", "ElasticityIncompatibleWorldSize"),
        )
    },
    submodules=("elasticity",),
    missing={
        "DSElasticAgent": "`ds run --nnodes MIN:MAX --max-restarts N` starts elastic jobs",
        "ElasticityConfig": 'use the section "elasticity" of a config',
    },
)
