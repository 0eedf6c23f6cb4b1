"""The command `ds_report`: what `ds ops report` and `ds report` show, by the original's flags."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence


def main(hide_operator_status: bool = False, hide_errors_and_warnings: bool = False) -> None:
    """Write the report to standard output.

    Args:
        hide_operator_status: without the table of ops.
        hide_errors_and_warnings: without the warnings.
    """
    from ds_core.cli import ops_report, reporting

    findings = reporting.collect()
    if hide_errors_and_warnings:
        findings = dataclasses.replace(findings, warnings=[])
    if hide_operator_status:
        findings = dataclasses.replace(findings, ops=[], build_tools={})
    else:
        sys.stdout.write(ops_report.render(ops_report.collect()) + "\n")
    sys.stdout.write(reporting.render(findings))


def cli_main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ds_report", description="Show this machine, torch, and what is installed and works."
    )
    add = parser.add_argument
    add("--hide_operator_status", action="store_true", help="without the table of ops")
    add("--hide_errors_and_warnings", action="store_true", help="without the warnings")
    given = parser.parse_args(args)
    main(given.hide_operator_status, given.hide_errors_and_warnings)


if __name__ == "__main__":
    cli_main()
