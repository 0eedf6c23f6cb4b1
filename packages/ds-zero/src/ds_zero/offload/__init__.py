"""Where a shard lives between its uses: on the device, in host memory, or on disk.

| kind of state                      | lives on                                                 |
|------------------------------------|----------------------------------------------------------|
| parameters (stage 3)               | `Offload.parameters`: device, cpu, nvme                  |
| master weights, moments            | `Offload.optimizer`: device, cpu, nvme                   |
| gradients                          | the host, where the optimizer's states are not on device |

`crossing` moves between device and host, `swap` and `shard_home` between memory and disk; the step
of an optimizer is the same wherever its states are. `speculative`, `twin_flow` and `zenflow` are
about when the host takes it: before the gradient norm is known, beside the device, or in parts.

Source: Ren et al. 2021, "ZeRO-Offload"; Rajbhandari et al. 2021, "ZeRO-Infinity".
"""

from ds_zero.offload.choice import Offload, Tier

__all__ = ["Offload", "Tier"]
