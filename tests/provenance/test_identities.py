"""A ledger on forgotten identities: salted hashes, no templates, no names unless asked."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_case import tiny_classifier
from torch import nn

from zsu_fast import ArgumentError, EmbeddingClassifier, Ledger
from zsu_fast.models.parameters import weights_hash
from zsu_fast.provenance.ledger import verify
from zsu_fast.provenance.record import Record
from zsu_fast.provenance.templates import hash_templates, matching
from zsu_fast.unlearner import ZeroShotUnlearner

QUICK: dict[str, Any] = {"impressions_per_class": 8, "steps": 60, "progress": False}


def of(classifier: EmbeddingClassifier, identity: int) -> torch.Tensor:
    return classifier.templates[classifier.identity == identity]


def test_a_hash_depends_on_the_template_and_on_the_salt() -> None:
    classifier = tiny_classifier()
    bob, cleo = of(classifier, 1), of(classifier, 2)
    salt = "00" * 16
    one, same = hash_templates([bob], salt), hash_templates([bob.double()], salt)
    assert one == same
    assert hash_templates([cleo], salt)["templates"] != one["templates"]
    first, second = hash_templates([bob]), hash_templates([bob])
    assert first["salt"] != second["salt"]
    assert first["templates"] != second["templates"]


def test_who_holds_the_template_finds_the_person_in_a_gallery_numbered_anew() -> None:
    classifier = tiny_classifier()
    hashed = {"identities": hash_templates([of(classifier, 1), of(classifier, 3)])}
    assert matching(hashed, classifier) == [1, 3]
    other = EmbeddingClassifier(classifier.encoder, classifier.templates[[3, 0, 2]])
    assert matching(hashed, other) == [0]
    assert matching({}, classifier) == []


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbeddingClassifier, nn.Module]:
    """The ledger of a run that forgets bob, the model before it, and the result."""
    path, classifier = tmp_path_factory.mktemp("ledger") / "l.jsonl", tiny_classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so short a run, the verdict is no matter here
        result = ZeroShotUnlearner(classifier, "bob", ledger=path, **QUICK).run()
    return path, classifier, result


def test_an_entry_holds_neither_name_nor_template(entry: Any) -> None:
    path, classifier, _ = entry
    text = path.read_text()
    assert "bob" not in text
    metrics = json.loads(text)["metrics"]
    assert matching(metrics, classifier) == [1]
    assert len(metrics["identities"]["salt"]) == 32
    for value in of(classifier, 1).flatten().tolist():
        assert f"{value:.6g}"[:7] not in text


def test_an_entry_has_the_hash_of_the_encoder_alone(entry: Any) -> None:
    path, classifier, result = entry
    found = json.loads(path.read_text())
    assert found["hash_before"] == weights_hash(classifier.encoder)
    assert found["hash_after"] == weights_hash(result.encoder)
    assert verify(path, model=result) == []
    assert verify(path, model=result.encoder) == []
    assert len(verify(path, model=classifier)) == 1


def test_the_next_request_knows_who_was_forgotten_by_the_template(entry: Any) -> None:
    path, _, result = entry
    smaller = EmbeddingClassifier(result.encoder, result.templates[[3, 1, 2]], ["d", "b", "c"])
    run = ZeroShotUnlearner(smaller, "c", ledger=path, **QUICK)
    assert run.forgotten == [1]
    assert Ledger(path, other_base=True).forgotten_identities(smaller) == []
    with pytest.raises(ArgumentError, match="forgotten before"):
        ZeroShotUnlearner(smaller, "b", ledger=path, **QUICK)


def named_record() -> Record:
    facts = Record("Net", [1], 5, {}, {}, {}, "now", "before", labels={"1": "bob"})
    facts.weights_after, facts.identities = "after", hash_templates([torch.ones(1, 4)])
    facts.impressions, facts.split = {"hit_rate": 1.0}, {"trained": ["fc"]}
    facts.fit = {"best": {"leak": 0.0, "agreement": 1.0, "divergence": 0.1}, "stopped": "done"}
    facts.timings = {"total": 1.0}
    facts.warnings = ["no impression of 'bob' reached it; bobsled stays."]
    return facts


def test_names_are_written_only_where_asked_for(tmp_path: Path) -> None:
    plain = Ledger(tmp_path / "a").append(named_record())
    assert "labels" not in plain["metrics"]
    assert plain["metrics"]["warnings"] == [
        "no impression of identity 1 reached it; bobsled stays."
    ]
    named = Ledger(tmp_path / "b", names=True).append(named_record())
    assert named["metrics"]["labels"] == {"1": "bob"}
    assert "'bob'" in named["metrics"]["warnings"][0]


def test_names_of_classes_stay(tmp_path: Path) -> None:
    facts = named_record()
    facts.identities = {}
    assert Ledger(tmp_path / "a").append(facts)["metrics"]["labels"] == {"1": "bob"}
