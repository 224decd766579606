"""Templates are the means that they say, and what can't be enrolled is refused by name."""

from __future__ import annotations

import pytest
import torch
from encoder_case import NAMES, labelled, tiny_encoder
from support import tiny_data
from torch.nn import functional as F

from zsu_fast import ArgumentError, ModelError, UnlearningWarning
from zsu_fast.evaluation.enrolment import enroll
from zsu_fast.models.parameters import weights_hash


def test_a_template_is_the_mean_of_unit_embeddings_of_the_first_images() -> None:
    encoder, (images, names) = tiny_encoder(), labelled()
    gallery = enroll(encoder, (images, names), images_per_identity=3, batch=7)
    own = images[[i for i, name in enumerate(names) if name == "cleo"][:3]]
    expected = F.normalize(encoder(own), dim=1).mean(0)
    torch.testing.assert_close(gallery.of("cleo")[0], expected)
    assert gallery.names == NAMES
    assert gallery.encoder == weights_hash(encoder)


def test_every_image_may_give_a_template() -> None:
    gallery = enroll(tiny_encoder(), labelled(), images_per_identity=4, every_image=True)
    assert len(gallery.templates) == 20
    assert gallery.identity is not None
    assert torch.bincount(gallery.identity).tolist() == [4] * 5


def test_the_encoder_runs_in_eval_mode_and_returns_to_its_modes() -> None:
    encoder = tiny_encoder()
    expected = enroll(encoder, labelled()).templates
    encoder.train()
    assert torch.equal(enroll(encoder, labelled()).templates, expected)
    assert encoder.training


def test_numbers_become_names_in_their_order_whatever_that_of_the_images() -> None:
    images, labels = tiny_data(20)
    labels = torch.tensor([7, 10, 0, 9, 8])[labels]
    gallery = enroll(tiny_encoder(), (images.flip(0), labels.flip(0)))
    assert gallery.names == ("0", "7", "8", "9", "10")
    other = enroll(tiny_encoder(), (images, labels))  # sums in another order
    torch.testing.assert_close(gallery.of("7"), other.of("7"))


def test_fewer_images_than_asked_for_are_warned_of() -> None:
    with pytest.warns(UnlearningWarning, match="fewer than 50 images of 'ann'"):
        enroll(tiny_encoder(), labelled(), images_per_identity=50)


def test_one_identity_under_two_names_is_warned_of() -> None:
    images, names = labelled(10)
    with pytest.warns(UnlearningWarning, match="'ann' and 'zoe'"):
        enroll(
            tiny_encoder(), (torch.cat([images, images[:1]]), [*names, "zoe"]),
            images_per_identity=1,
        )  # fmt: skip


def test_an_encoder_that_does_not_return_vectors_is_refused() -> None:
    with pytest.raises(ModelError, match=r"returns \(20, 8, 3, 3\), not one vector each"):
        enroll(tiny_encoder().conv, labelled(20))
    encoder = tiny_encoder()
    encoder.fc1.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or infinite"):
        enroll(encoder, labelled())
    encoder.fc1.weight.data.zero_()
    encoder.fc1.bias.data.zero_()
    with pytest.raises(ModelError, match="of 20 images of 'ann' are 0"):
        enroll(encoder, labelled())


def test_options_are_checked() -> None:
    with pytest.raises(ArgumentError, match="images_per_identity"):
        enroll(tiny_encoder(), labelled(), images_per_identity=0)
    with pytest.raises(ArgumentError, match="metric"):
        enroll(tiny_encoder(), labelled(), metric="l1")  # type: ignore[arg-type]
