"""The page of an encoder's audit shows the distributions, and nothing of classifiers."""

from __future__ import annotations

import pytest
from encoder_case import NAMES, blinded, labelled, tiny_classifier, tiny_encoder

from zsu_fast import audit
from zsu_fast.evaluation.report.page import render


@pytest.fixture(scope="module")
def page() -> str:
    original = tiny_classifier()
    result = audit(
        original, blinded(original, 1), "bob", labelled(200), tiny_encoder(), relearn_steps=3,
        shots=5, progress=False,
    )  # fmt: skip
    return render(result, names=NAMES)


def test_distributions_are_plots_of_each_model(page: str) -> None:
    for gallery in ("original&#39;s templates", "re-enrolled"):
        assert f"<h2>Similarities, {gallery}</h2>" in page
    first, second = page.split("<h2>Similarities, ")[1:]
    assert first.count('<svg class="chart"') == 3
    assert first.count('class="line unlearned"') == 4  # three charts and the legend
    assert first.count('class="line golden"') == 1  # the golden encoder has no templates there
    assert 'class="line golden"' in second
    assert "FAR 1 %" in first


def test_the_page_has_no_empty_section_of_classifiers(page: str) -> None:
    assert "Forgotten: 1 of 5 identities (bob)" in page
    for heading in ("Accuracy of each class", "Inside the model", "by layer", "Mask: the"):
        assert heading not in page
    assert "Relearning the forgotten identities" in page
