"""Runs a command of ``zsu-fast`` in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from zsu_fast.cli.app import app

# Options for a run on LeNet5 that takes about a second.
QUICK = ["--impressions-per-class", "8", "--tail", "last"]


def call(*arguments: str, code: int = 0) -> str:
    """The output of a command that has to end with the exit code ``code``."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if "--json" in arguments else result.output  # warnings go to stderr
