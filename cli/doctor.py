"""``laxity doctor``: is this installation in order?"""

from __future__ import annotations

import sys

import click
import msgspec
from rich.table import Table
from rich.text import Text

from cli.options import json_option, print_json, print_table

_STYLE = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Look for what is wrong with this installation and say what to do; exit 1 if something keeps it from working.

    \b
    Examples:
      laxity doctor
      laxity doctor --json
    """
    from cli.checks import all_findings

    findings = all_findings()
    if as_json:
        print_json(msgspec.to_builtins(findings))
    else:
        table = Table("check", "state", "found", "what to do")
        for finding in findings:
            state = Text(finding.state, style=_STYLE[finding.state])
            table.add_row(Text(finding.check), state, Text(finding.found), Text(finding.advice))
        print_table(table)
    if any(finding.state == "error" for finding in findings):
        sys.exit(1)
