"""Gives each benchmark file one table, written to ``results/`` at its end; one CPU thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.harness import Table


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name = request.module.__name__.removeprefix("bench_")
    table = Table(name, request.module.__doc__.splitlines()[0])
    yield table
    table.write()
