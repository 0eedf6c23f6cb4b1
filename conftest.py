"""The test kit's fixtures (`ranks`, `world_size`, `poison_empty`) for every test of the repository."""

pytest_plugins = ["ds_core.testing.pytest_plugin"]
