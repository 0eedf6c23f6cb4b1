"""Muon by the names of its implementations elsewhere, which take groups with `use_muon`."""

from __future__ import annotations

from deepspeed._names import names_of

_INSTEAD = (
    'use ds_ops.optim.Muon(model.named_parameters(), lr=...), or the type "Muon" in the '
    "configuration; an attribute use_muon of a parameter decides whether it is orthogonalized"
)

__getattr__, __dir__ = names_of(
    __name__,
    {},
    missing=dict.fromkeys(
        (
            *("Muon", "MuonWithAuxAdam", "SingleDeviceMuon", "SingleDeviceMuonWithAuxAdam"),
            *("adam_update", "muon_update", "zeropower_via_newtonschulz5"),
        ),
        _INSTEAD,
    ),
)
