"""The command `deepspeed`, on ds_core.launcher."""
