"""A small trained encoder, labelled images of five identities, and its gallery."""

from __future__ import annotations

import copy

from support import SPEC, TinyNet, tiny, tiny_data
from torch import Tensor, nn

from zsu_fast import EmbeddingClassifier
from zsu_fast.evaluation.enrolment import enroll
from zsu_fast.models.gallery import Gallery

NAMES = ("ann", "bob", "cleo", "dan", "eve")


class TinyEncoder(nn.Module):
    """`TinyNet` up to its first linear layer: float [N, 3, 8, 8] -> [N, 32]."""

    def __init__(self) -> None:
        super().__init__()
        net = TinyNet()
        self.conv, self.bn, self.act, self.fc1 = net.conv, net.bn, net.act, net.fc1
        self.input_spec = SPEC

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(self.act(self.bn(self.conv(x))).flatten(1))


def tiny_encoder() -> TinyEncoder:
    trained, encoder = tiny(), TinyEncoder()
    for name in ("conv", "bn", "fc1"):
        getattr(encoder, name).load_state_dict(getattr(trained, name).state_dict())
    return encoder.eval()


def labelled(count: int = 100, seed: int = 3) -> tuple[Tensor, list[str]]:
    """Images and the names of their identities."""
    images, labels = tiny_data(count, seed)
    return images, [NAMES[c] for c in labels.tolist()]


def tiny_gallery(encoder: nn.Module) -> Gallery:
    return enroll(encoder, labelled(50, seed=2))


def tiny_classifier() -> EmbeddingClassifier:
    encoder = tiny_encoder()
    return tiny_gallery(encoder).classifier(encoder)


def blinded(classifier: EmbeddingClassifier, identity: int) -> EmbeddingClassifier:
    """A copy whose embeddings have no part along one template: deep forgetting by hand."""
    result = copy.deepcopy(classifier)
    axis = nn.functional.normalize(result.templates[identity], dim=0)
    layer = result.encoder.get_submodule("fc1")
    assert isinstance(layer, nn.Linear)
    keep = layer.weight.new_ones(len(axis)).diag() - axis[:, None] * axis
    layer.weight.data = keep @ layer.weight.data
    layer.bias.data = keep @ layer.bias.data
    return result
