"""The rows of deep forgetting for a multi-label model."""

from __future__ import annotations

import torch
from deep_case import row_source
from multi_label_case import several
from support import FORGET

from zsu_fast.runtime.progress import Reporter
from zsu_fast.training.deep.deep import DeepRows
from zsu_fast.training.deep.tail import FrozenClassifierTail


def test_rows_are_inverted_to_a_sigmoid_and_are_forgotten_by_what_the_original_sees() -> None:
    source = row_source(several(), multi_label=True)
    found = source.invert(range(5), Reporter(False))
    logits = source.deep.flat(found.images)
    own = logits.detach().sigmoid().gather(1, found.labels[:, None])[:, 0]
    assert torch.allclose(found.confidence, own, atol=1e-5)
    assert found.hit_rate > 0.5
    tail = FrozenClassifierTail(source.model, source.deep)
    inverted = source.deep.features(found.images)
    data = DeepRows.label(
        tail, source.scenes.features, inverted, found.labels, source.forget, multi_label=True
    )
    sees = (data.rows.teacher[:, FORGET] >= 0).any(1)
    assert torch.equal(data.rows.forgotten, sees)
    count = len(found)
    # rows inverted to a retained class may show a forgotten one as well
    assert bool((sees[-count:] & ~source.forget[found.labels]).any())
