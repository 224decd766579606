"""Identification rates against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zsu_fast.evaluation import identification
from zsu_fast.evaluation.identification import Matches, distributions, match

# Similarities of 6 images with 3 identities; identity 2 is to be forgotten.
TABLE = torch.tensor(
    [
        [0.9, 0.1, 0.2],
        [0.3, 0.2, 0.1],
        [0.5, 0.8, 0.0],
        [0.1, 0.6, 0.7],
        [0.2, 0.7, 0.9],
        [0.4, 0.3, 0.1],
    ]
)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
FORGET = torch.tensor([False, False, True])


def matched(table: Tensor = TABLE, labels: Tensor = LABELS, forget: Tensor = FORGET) -> Matches:
    return match(torch.eye(len(table)), labels, lambda z: z @ table, forget)


def test_impostors_are_pairs_of_retained_identities() -> None:
    found = matched()
    assert sorted(found.impostors.tolist()) == pytest.approx([0.1, 0.1, 0.2, 0.5])


def test_rates_are_those_counted_by_hand() -> None:
    found = matched()
    retained = ~found.forgotten
    assert found.rank1(retained) == 75.0  # image 3 is taken for identity 2
    assert found.rank1(found.forgotten) == 50.0
    assert found.rank1(found.forgotten, 0.95) == 0.0
    assert found.true_accepts(retained, 0.5) == 75.0
    assert found.accepted_as_another(found.forgotten, 0.5) == 50.0
    assert found.attraction(0.5).tolist() == [0.0, 0.5, 0.0]
    assert found.attraction_ratio(0.5) == 1.0  # half of the images, and there are two identities
    assert found.attraction_ratio(0.99) == 0.0
    assert found.rank1(torch.zeros(6, dtype=torch.bool)) is None


def test_at_most_the_asked_share_of_impostors_is_above_the_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(200, 20, generator=generator).mul(50).round().div(50)  # with ties
    found = matched(table, torch.arange(200) % 20, torch.arange(20) >= 18)
    for far in (0.1, 1e-2):
        threshold = found.threshold(far)
        assert threshold is not None
        assert float((found.impostors > threshold).float().mean()) <= far
        lower = float((found.impostors >= threshold).float().mean())
        assert lower > far  # the smallest such threshold


def test_too_few_impostors_give_no_threshold() -> None:
    assert matched().threshold(1e-2) is None
    assert matched().threshold(0.25) == pytest.approx(0.2)


def test_many_templates_keep_a_subset_of_impostors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identification, "_MAX_IMPOSTORS", 6)
    assert len(matched().impostors) == 2  # one column of four retained images, without the own


def test_without_retained_identities_nothing_attracts() -> None:
    found = matched(forget=torch.tensor([True, True, True]))
    assert found.attraction_ratio(0.0) is None
    assert found.accepted_as_another(found.forgotten, 0.0) == 0.0
    assert found.threshold(0.5) is None


def test_distributions_share_their_bins_and_sum_to_all() -> None:
    first, second = distributions([matched(), matched(TABLE - 0.5)])
    assert set(first) == {
        "forgotten, own", "forgotten, other", "retained, own", "retained, other"
    }  # fmt: skip
    for kind, points in first.items():
        assert sum(share for _, share in points) == pytest.approx(100)
        assert [x for x, _ in points] == [x for x, _ in second[kind]]
