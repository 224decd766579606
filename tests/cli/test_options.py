"""Groups of options are options of their own to Typer, and dataclasses to the command."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from zsu_fast.cli.options import expand_options


@dataclass(frozen=True)
class Size:
    """Two options."""

    width: Annotated[int, typer.Option(help="in pixels")]
    height: Annotated[int, typer.Option(help="in pixels")] = 3


def test_options_are_expanded_and_collected() -> None:
    received = []

    @expand_options
    def draw(name: str, size: Size, seed: int = 0) -> None:
        """Draws."""
        received.append((name, size, seed))

    app = typer.Typer()
    app.command()(draw)
    assert list(inspect.signature(draw).parameters) == ["name", "width", "height", "seed"]
    result = CliRunner().invoke(app, ["box", "--width", "2", "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert received == [("box", Size(2, 3), 5)]
    assert "Draws." in CliRunner().invoke(app, ["--help"]).output
    assert CliRunner().invoke(app, ["box"]).exit_code == 2  # --width is required
