"""The model card: README.md in the folder of an unlearned model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.input_spec import InputSpec

_USAGE = {
    "transformers": "from transformers import {kind}\n\n"
    'model = {kind}.from_pretrained("this-folder").eval()',
    "timm": "import timm\n\n"
    'model = timm.create_model("local-dir:this-folder", pretrained=True).eval()',
    "zsu-fast": "from zsu_fast.models.loading import load_model\n\n"
    'model = load_model("hf:this-folder")',
    "": "from zsu_fast.models.loading import load_model\n\n"
    "# a function of yours that builds the model, which this folder does not hold\n"
    'model = load_model("your_package.your_module:factory", "this-folder/model.safetensors")',
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides the record.

    Attributes:
        kind: class name of the model.
        library: "transformers", "timm", or "zsu-fast" if this package's loader builds it; "" for a
            class of the user's own.
        base_model: id of the base model on a hub, where known.
        names: of the model's classes, in their order, where known.
        spec: the images, where known.
        verdict: one sentence; "" if none was given.
        record_hash: SHA-256 of record.json.
    """

    kind: str
    library: str
    base_model: str | None
    names: Sequence[str] | None
    spec: InputSpec | None
    verdict: str
    record_hash: str


def model_card(facts: CardFacts, record: Mapping[str, Any] | None) -> str:
    """Returns the text of README.md, with YAML metadata as Hugging Face's hub reads it.

    Args:
        facts: about the model.
        record: `Record.to_dict` of the run that made it; None if there is none.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("zsu_fast.provenance", "."), autoescape=False,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["md"] = _escape
    told = {} if record is None else _told(record, facts.verdict)
    return environment.get_template("model_card.md.j2").render(
        {
            "kind": facts.kind,
            "library": facts.library or "pytorch",
            "base_model": facts.base_model,
            "names": facts.names,
            "record": record,
            "record_hash": facts.record_hash,
            "verdict": facts.verdict,
            "forgotten": [],
            "usage": _USAGE[facts.library].format(kind=facts.kind),
            "images": _images(facts.spec),
        }
        | told
    )


def _told(record: Mapping[str, Any], verdict: str) -> dict[str, Any]:
    """The template's variables that come from the record."""
    labels = record.get("labels", {})
    best, depth = record["fit"].get("best") or {}, record["depth"]
    level = depth.get("level", "output")
    measured = "On held-out rows that the run synthesised, "
    if best:
        measured += (
            f"{_share(best.get('forgotten_leak', best['leak']))} of those of forgotten classes are "
            f"assigned one, and {best['agreement']:.2%} of "
            f"the others agree with the original model with the forgotten classes masked."
        )
    else:
        measured += "nothing was measured: the fit had no validation."
    if level == "deep" and "unmask_leak" in depth:
        measured += (
            f" With the original last layer put back, {_share(depth['unmask_leak']['after'])} of "
            f"the held-out rows of forgotten classes are assigned one of them "
            f"({_share(depth['unmask_leak']['before'])} before the run)."
        )
    words = "deep: the features forget too" if level == "deep" else "output: only the outputs"
    if depth.get("fallback"):
        words += "; deep was asked for, and was not reached"
    return {
        "forgotten": _named(record["forget"], labels),
        "before": _named(record["forgotten"], labels),
        "classes_before": record["classes"],
        "compact": record.get("compact"),
        "level": level,
        "level_words": words,
        "verdict": verdict or "none was given",
        "measured": measured,
        "notes": record["warnings"],
    }


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.2%}"


def _named(classes: Sequence[int], labels: Mapping[str, str]) -> list[str]:
    return [f"{c} ({labels[str(c)]})" if str(c) in labels else str(c) for c in classes]


def _images(spec: InputSpec | None) -> str:
    if spec is None:
        return "their shape is not known."
    guess = " (a guess)" if spec.assumed else ""
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (spec.mean, spec.std))
    return f"{' x '.join(map(str, spec.shape))}, mean {mean}, std {std}{guess}."


def _escape(text: str) -> str:
    """Text for a line or a table's cell of Markdown: nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]<>|#$])", r"\\\1", " ".join(str(text).split()))
