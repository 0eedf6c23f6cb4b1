"""When the host takes its part of a step: beside the device, ahead of the norm, or now and then.

| file          | what it does                                                              |
|---------------|---------------------------------------------------------------------------|
| `twin_flow`   | host and device update their shares at the same time (Offload++)          |
| `speculative` | the host steps during backward, and takes it back if need be (SuperOffload) |
| `zenflow`     | the important part steps at once, the rest every few steps (ZenFlow)       |
| `worker`      | the thread that they share                                                |
"""
