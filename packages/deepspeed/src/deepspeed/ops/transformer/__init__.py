"""The layer of BERT's encoder: `ds_ops.TransformerLayer` by the original's names."""

from __future__ import annotations

from deepspeed._names import names_of

_HOME = "deepspeed.ops.transformer.transformer"
_INFERENCE = "ds-inference will bring it; until then run the model itself in torch.inference_mode()"

__getattr__, __dir__ = names_of(
    __name__,
    {
        "DeepSpeedTransformerConfig": f"{_HOME}:DeepSpeedTransformerConfig",
        "DeepSpeedTransformerLayer": f"{_HOME}:DeepSpeedTransformerLayer",
    },
    submodules=("transformer",),
    missing=dict.fromkeys(
        (
            *("DeepSpeedInferenceConfig", "DeepSpeedMoEInference", "DeepSpeedMoEInferenceConfig"),
            "DeepSpeedTransformerInference",
        ),
        _INFERENCE,
    ),
)
