"""The page stands alone, stays small, and says the same as the audit."""

from __future__ import annotations

import base64
import copy
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support import tiny, tiny_data

import zsu_fast
from zsu_fast.errors import OutputError
from zsu_fast.evaluation.accuracy import Evaluation
from zsu_fast.evaluation.audit.result import Audit
from zsu_fast.evaluation.report import charts, pictures
from zsu_fast.evaluation.report.page import render, write_report
from zsu_fast.unlearner import ZeroShotUnlearner


@pytest.fixture(scope="module")
def run() -> ZeroShotUnlearner:
    unlearner = ZeroShotUnlearner(tiny(), [1], impressions_per_class=8, input_shape=(3, 8, 8),
                                  steps=60, mixtures=256, depth="output", space="input",
                                  progress=False)  # fmt: skip
    unlearner.run()
    return unlearner


@pytest.fixture(scope="module")
def result(run: ZeroShotUnlearner) -> Audit:
    return zsu_fast.audit(
        tiny(), run.apply(), [1], tiny_data(), input_shape=(3, 8, 8), impressions_per_class=4,
        shots=10, relearn_steps=5, progress=False,
    )  # fmt: skip


class Page(HTMLParser):
    """Collects tags' addresses and checks that tags nest."""

    VOID = ("meta", "img", "br", "line", "rect", "circle", "polygon", "polyline")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network_and_is_well_formed(
    result: Audit, run: ZeroShotUnlearner
) -> None:
    html = render(result, record=run.record.to_dict())
    page = Page(html)
    assert page.open == []
    assert all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert page.addresses
    assert not re.search(r"https?://|url\(|@import|<script|<link", html)
    assert len(html.encode()) < 5_000_000


def test_the_verdict_comes_first_and_all_parts_are_there(
    result: Audit, run: ZeroShotUnlearner
) -> None:
    record = run.record.to_dict()
    html = render(result, record=record)
    text = Page(html).text
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Tests", "The models side by side", "Accuracy of each class",
        "Predictions for forgotten classes", "Inside the model", "Class impressions",
        "The run", "All numbers",
    ]  # fmt: skip
    assert text.index(result.verdict[0]) < text.index("Tests")
    for sentence in result.verdict:
        assert sentence in text
    for value in (record["weights_before"], record["weights_after"], record["fit"]["stopped"]):
        assert value in text
    for row in result.rows:
        for reason in row.missing.values():
            assert reason in text
    for check in result.checks:
        assert check.says in text


def test_both_colour_schemes_and_narrow_screens_are_styled(result: Audit) -> None:
    html = render(result)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    light, dark = re.findall(r"--page: (#\w+)", html)
    for name in ("original", "unlearned", "golden", "good", "bad", "unsure", "text", "soft"):
        colours = re.findall(rf"--{name}: (#\w+)", html)
        assert len(colours) == 2
        least = 4.5 if name in ("good", "bad", "unsure", "text", "soft") else 3
        for colour, ground in zip(colours, (light, dark), strict=True):
            assert contrast(colour, ground) >= least, (name, colour)


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        lin = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_names_are_escaped(result: Audit) -> None:
    html = render(result, title="<b>&", names=["<script>x</script>"] * 5)
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html


def test_without_data_the_page_says_why(run: ZeroShotUnlearner) -> None:
    bare = zsu_fast.audit(tiny(), run.apply(), [1], input_shape=(3, 8, 8), progress=False,
                          impressions_per_class=4)  # fmt: skip
    text = Page(render(bare)).text
    assert "Not measured: no images were given" in text
    assert "Measured without any image" in text


def test_a_thousand_classes_are_sorted_changes(result: Audit) -> None:
    big = copy.copy(result)
    big.classes, big.forget = 1000, list(range(100))
    big.rows = copy.deepcopy(result.rows)
    for row in big.rows:
        after = row.name == "unlearned"
        accuracy = {c: 0.0 if after and c < 100 else 70.0 + c % 20 + after for c in range(1000)}
        row.evaluation = Evaluation(0.0, 80.0, 75.0, accuracy, 5000, 45000, big.forget)
    html = render(big)
    assert html.count('class="bar lost"') == 100
    assert html.count('class="bar retained"') == 900
    assert "100 forgotten classes: -79.5 on average, 100 down, 0 up" in html
    assert "900 other classes: +1.0 on average, 0 down, 900 up" in html
    assert len(html.encode()) < 1_000_000


def test_files_are_written_together_or_not_at_all(result: Audit, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    written = write_report(page, result)
    assert [p.name for p in written] == ["out.html", "out.json"]
    facts = json.loads(written[1].read_text())
    assert facts["audit"]["verdict"] == result.verdict
    page.unlink()
    with pytest.raises(OutputError, match=r"out\.json"):
        write_report(page, result)
    assert not page.exists()
    write_report(page, result, force=True)


def test_pictures_hold_the_pixels() -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    raw = base64.b64decode(pictures.data_uri(image).partition(",")[2])
    assert raw.startswith(b"\x89PNG")
    assert int.from_bytes(raw[16:20], "big") == 7
    body = raw[raw.index(b"IDAT") + 4 :]
    lines = zlib.decompressobj().decompress(body)
    rows = [lines[i * 22 + 1 : (i + 1) * 22] for i in range(5)]
    assert b"".join(rows) == image.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_charts_survive_odd_values() -> None:
    assert charts.lines([charts.Series("a", "original", [])], "t", "x", "y") == ""
    flat = charts.lines([charts.Series("a", "original", [(0, 1.0)])], "t", "x", "y", log_y=True)
    assert "nan" not in flat
    gap = [(0, 1.0), (1, float("nan")), (2, 5.0)]
    assert "nan" not in charts.lines([charts.Series("a", "original", gap)], "t<", "x", "y")
    assert charts.changes([], "none", "lost")[0].count("<rect") == 0


def test_changes_fill_the_axis_they_need() -> None:
    assert charts.changes([-83.0, -70.0], "t", "lost")[1] == [-100, 0]
    assert charts.changes([-1.5, 0.0, 4.0], "t", "retained")[1] == [-2, 5]
    assert charts.changes([0.0], "t", "retained")[1] == [0, 1]
