"""The section `sparse_attention` of a DeepSpeed config, as the layout that it names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ds_core.errors import ConfigError
from ds_ops.sparse_attention.layouts import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
)

#: Layouts by the section's `mode`.
MODES: Mapping[str, type[SparsityConfig]] = MappingProxyType(
    {
        "dense": DenseSparsityConfig,
        "fixed": FixedSparsityConfig,
        "variable": VariableSparsityConfig,
        "bigbird": BigBirdSparsityConfig,
        "bslongformer": BSLongformerSparsityConfig,
        "local_sliding_window": LocalSlidingWindowSparsityConfig,
    }
)

#: Where the section leaves out a key, and the class's own default is another.
_DEFAULTS = {"bigbird": {"num_random_blocks": 0}}

_PATH = "sparse_attention"


def sparsity_config(section: Mapping[str, Any], num_heads: int) -> SparsityConfig:
    """The layout that a config's section `sparse_attention` asks for.

        config = json.load(open("ds_config.json"))
        layout = sparsity_config(config["sparse_attention"], num_heads=12)

    Args:
        section: `mode` (default "fixed") and parameters of that mode's class by name. Keys that
            are left out have the class's defaults, but "bigbird" has no random blocks then, as in
            DeepSpeed.
        num_heads: of the attention, which the section does not say.

    Raises ConfigError for an unknown mode or key, and for values that do not fit.
    """
    given = dict(section)
    mode = given.pop("mode", "fixed")
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(f"{_PATH}.mode: got {mode!r}, expected one of {', '.join(MODES)}")
    known = set(inspect.signature(MODES[mode]).parameters) - {"num_heads"}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(
            f"{_PATH}.{unknown[0]}: mode {mode!r} has no such key; it has "
            f"{', '.join(sorted(known))}"
        )
    try:
        return MODES[mode](num_heads, **(_DEFAULTS.get(mode, {}) | given))
    except ConfigError as error:
        raise ConfigError(f"{_PATH}: {error}") from error
