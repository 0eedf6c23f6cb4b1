"""When a step is taken: after backward, in it, beside the device, or ahead of the norm.

| file            | what it does                                                                |
|-----------------|-----------------------------------------------------------------------------|
| `host_step`     | what all of them answer; one unit after the other, after backward           |
| `early_updates` | each unit in backward, as soon as its gradient is complete (LOMO)           |
| `twin_flow`     | host and device update their shares at the same time (Offload++)            |
| `speculative`   | the host steps during backward, and takes it back if need be (SuperOffload) |
| `zenflow`       | the important part steps at once, the rest every few steps (ZenFlow)        |
| `chosen`        | which of them it is; `combinations`: which go together                      |
| `worker`        | the thread of those that have one                                           |
"""
