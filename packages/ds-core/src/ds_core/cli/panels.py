"""Help of a command with many options: under headings, and with text that stays as written."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class PanelCommand(TyperCommand):
    """A command whose options are listed under the heading that each names.

    The heading of an option is its `rich_help_panel`; options without one come last.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                name = getattr(param, "rich_help_panel", None) or "Other"
                panels.setdefault(name, []).append(record)
        for name in sorted(panels, key=lambda panel: panel == "Other"):
            with formatter.section(name):
                formatter.write_dl(panels[name])

    def closing_text(self) -> str:
        """What the help ends with, shown as it is written."""
        return ""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        text = self.closing_text()
        if text:
            formatter.write(f"\n{text}\n")
