"""Models that only seem to forget are caught by name; the golden model passes everything."""

from __future__ import annotations

import pytest
from conftest import FAKES
from torch import Tensor, nn

from zsu_fast.audit import audit
from zsu_fast.demo import FORGET


@pytest.mark.parametrize("fake", FAKES)
@pytest.mark.parametrize("with_data", [False, True], ids=["no data", "data"])
def test_each_fake_is_caught_by_name(
    original: nn.Module, images: tuple[Tensor, Tensor], fake: str, with_data: bool
) -> None:
    make, name = FAKES[fake]
    data = images if with_data else None
    result = audit(original, make(original), FORGET, data, relearn_steps=0, progress=False)
    assert result.found(name), str(result)
    assert not result.passed
    assert name in result.verdict[0] or name == "one class only"
    if name == "mask":
        assert result.verdict[0].startswith("Only the output was hidden"), result.verdict[0]
    # no other name but what follows from it
    allowed = {name, "not forgotten", "output level"}
    assert {f.name for f in result.findings} <= allowed, str(result)
