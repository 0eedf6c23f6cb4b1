"""Command-line arguments of programs that DeepSpeed configures."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config FILE` to a program's own arguments; returns it."""
    group = parser.add_argument_group("DeepSpeed", "how the run is configured")
    group.add_argument(
        "--deepspeed", action="store_true", help="train with DeepSpeed; for the program's own use"
    )
    group.add_argument(
        "--deepspeed_config", type=str, default=None, help="the configuration, a JSON file"
    )
    group.add_argument("--deepscale", action="store_true", help="former name of --deepspeed")
    group.add_argument(
        "--deepscale_config", type=str, default=None, help="former name of --deepspeed_config"
    )
    return parser
