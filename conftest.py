"""The fixtures of the test kit (`ranks`, `world_size`, `poison_empty`) for all tests here."""

pytest_plugins = ["ds_core.testing.pytest_plugin"]
