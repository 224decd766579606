"""Folders that people can publish: weights, config, labels, record, and a model card.

transformers and timm write and read their own formats; for other models, `models.folder_config`
says what config.json holds. Each folder is read back before it appears: what was written gives the
same model, or there is no folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ModelError, ZsuFastError
from ..models import checkpoint
from ..models.compact import Compaction
from ..models.compact_file import compact_metadata
from ..models.folder_config import Architecture, architectures, read_spec, to_config
from ..models.infer_spec import resolve_spec
from ..models.input_spec import InputSpec, noise_images
from ..models.labels import known_labels
from ..models.loading import load_model
from ..models.parameters import UNCOPYABLE, deep_copy, state, unwrap, weights_hash
from ..models.wrapper import pick_logits
from .model_card import CardFacts, model_card
from .new_folder import new_folder
from .record import Record

_PROCESSOR = "preprocessor_config.json"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    record: Record | Mapping[str, Any] | None = None,
    verdict: Any = None,
    force: bool = False,
) -> Path:
    """Writes a folder that can be published: config, labels, weights, record and model card.

    A transformers model is read back by ``from_pretrained(folder)``, one of timm by
    ``timm.create_model("local-dir:folder", pretrained=True)``, and all but classes of the user's
    own by ``load_model("hf:folder")``, ``zsu-fast ... hf:folder``. The folder is read back before
    it appears, and must give the same weights and logits. The card says which classes were
    forgotten, when, how, by which record and with which verdict. State the license of the base
    model in it. Nothing is uploaded: use the client of your hub, such as
    ``huggingface_hub.upload_folder``.

    Args:
        model: an unlearned model.
        folder: the folder to write.
        record: of the run that made ``model``, or the content of its JSON file.
        verdict: a `Verdict`, or any text.
        force: replace the files of a model in ``folder``.

    Returns:
        The path of the folder.

    Raises:
        ArgumentError: ``record`` is of other weights than those of ``model``.
        ModelError: what was written does not give the same model, or can't be written.
        OutputError: ``folder`` is not empty (without ``force``), holds other files, or can't be
            written. There is no partial folder then.
    """
    with written_folder(model, folder, record=record, verdict=verdict, force=force) as path:
        return path


@contextmanager
def written_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    record: Record | Mapping[str, Any] | None = None,
    verdict: Any = None,
    force: bool = False,
    compaction: Compaction | None = None,
) -> Iterator[Path]:
    """`save_pretrained` for a block: if the block raises, the folder is as it was before.

    ``compaction`` is what was cut since the architecture was built; None for that of the record.
    """
    facts = _check_record(model, record)
    source = deep_copy(unwrap(model), UNCOPYABLE)
    source.cpu()
    source.eval()
    if compaction is None and facts is not None and facts.get("compact"):
        compaction = Compaction.from_dict(facts["compact"])
    sentence = str(getattr(verdict, "sentence", verdict or ""))
    contents = _Contents(source, facts, sentence, compaction)
    with new_folder(folder, contents.write, force) as path:
        yield path


def _check_record(
    model: nn.Module, record: Record | Mapping[str, Any] | None
) -> dict[str, Any] | None:
    facts = record.to_dict() if isinstance(record, Record) else record
    if facts is None:
        return None
    needed = {"forget", "forgotten", "classes", "started", "weights_before", "weights_after",
              "versions", "fit", "depth", "warnings"}  # fmt: skip
    if not isinstance(facts, Mapping) or not needed <= set(facts):
        raise ArgumentError("record", f"got a {type(record).__name__}", "Pass a run's record.")
    own = weights_hash(model)
    if facts["weights_after"] != own:
        raise ArgumentError(
            "record",
            f"its run ended with weights {str(facts['weights_after'])[:12]}..., this model has "
            f"{own[:12]}...",
            "Pass the run's result as it is, in its own dtype, with its own record.",
        )
    return dict(facts)


@dataclass
class _Contents:
    """Writes the files of a folder for one model.

    Attributes:
        model: a copy on the CPU, in eval mode.
        record: `Record.to_dict`; None if there is none.
        verdict: in one sentence, or "".
        compaction: what was cut; for the metadata of the weights.
    """

    model: nn.Module
    record: dict[str, Any] | None
    verdict: str
    compaction: Compaction | None

    def write(self, folder: Path) -> None:
        """Writes all files into the empty ``folder``, and reads the model back."""
        spec, logits = self._spec_and_logits()
        classes = None if logits is None else int(logits.shape[1])
        labels = None if classes is None else known_labels(self.model, classes)
        # assumed names would look like facts in the folder; whoever loads it is told again
        names = None if labels is None or labels.assumed else labels.names
        try:
            library = self._write_model(folder, classes, names, spec, logits)
        except (ZsuFastError, OSError):
            raise
        except Exception as error:  # of the libraries, for models they can't describe
            raise ModelError(
                f"{type(self.model).__name__} can't be saved as a folder "
                f"({type(error).__name__}: {error})",
                "Save its weights to a file instead.",
            ) from error
        content = b""
        if self.record is not None:
            content = json.dumps(self.record, indent=2).encode()
            (folder / "record.json").write_bytes(content)
        facts = CardFacts(
            type(self.model).__name__, library, _base_model(self.model), names, spec, self.verdict,
            hashlib.sha256(content).hexdigest(),
        )  # fmt: skip
        (folder / "README.md").write_text(model_card(facts, self.record), encoding="utf-8")

    def _spec_and_logits(self) -> tuple[InputSpec | None, Tensor | None]:
        """The images as the record states them, else the model; and the logits of two of noise."""
        try:
            spec = read_spec((self.record or {}).get("input")) or resolve_spec(self.model)
            return spec, _logits(self.model, spec)
        except Exception:  # noqa: BLE001  images unknown: the weights alone are compared
            return None, None

    def _write_model(
        self, folder: Path, classes: int | None, names: tuple[str, ...] | None,
        spec: InputSpec | None, logits: Tensor | None,
    ) -> str:  # fmt: skip
        """Writes config and weights, checks them, and returns the library that reads them."""
        if _is_transformers(self.model):
            kind: Any = type(self.model)
            kind.save_pretrained(self.model, folder)
            _copy_processor(self.model, folder)
            self._check(kind.from_pretrained(folder, local_files_only=True), spec, logits)
            return "transformers"
        if _is_timm(self.model):
            _save_timm(self.model, folder, names)
            self._check(load_model(f"hf:{folder}"), spec, logits)
            return "timm"
        facts = self.record
        rows = facts is not None and not facts.get("compact")
        left = [*facts["forget"], *facts["forgotten"]] if facts is not None and rows else []
        metadata = {"format": "pt"} | compact_metadata(self.compaction, left)
        checkpoint.save_tensors(folder / "model.safetensors", self.model.state_dict(), metadata)
        found: list[Architecture | None] = [*architectures(self.model, classes)] if classes else []
        for architecture in [*found, None]:
            config = to_config(self.model, classes, architecture, names, spec)
            text = json.dumps(config, indent=2) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
            if architecture is None:  # a class of the user's own: only they can build it
                return ""
            try:
                self._check(load_model(f"hf:{folder}"), spec, logits)
            except ModelError:
                continue
            return "zsu-fast"
        raise AssertionError("unreachable")

    def _check(self, again: nn.Module, spec: InputSpec | None, logits: Tensor | None) -> None:
        """Raises ModelError if ``again``, read from the folder, is another model."""
        own = state(self.model)
        for name, tensor in state(again).items():
            if name in own:
                tensor.data = tensor.data.to(own[name].dtype)  # timm builds float32 for any file
        same = weights_hash(again) == weights_hash(self.model)
        if same and spec is not None and logits is not None:
            found = _logits(again, spec)
            same = torch.allclose(found, logits, 1e-4, 1e-5 * float(logits.abs().max()))
        if not same:
            raise ModelError(
                f"{type(self.model).__name__} read back from its folder is another model: its "
                f"config does not describe it in full",
                "Build the model by its library's factory, with the arguments that it was trained "
                "with, or save its weights to a file instead.",
            )


def _logits(model: nn.Module, spec: InputSpec) -> Tensor:
    """Of two images of noise, in the model's own dtype, as float32 [2, classes]."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        logits: Tensor = pick_logits(model(noise_images(spec, 2).to(dtype))).float()
    if logits.ndim != 2:
        raise ModelError(f"its output is {tuple(logits.shape)}", "Pass an image classifier.")
    return logits


def _is_transformers(model: nn.Module) -> bool:
    module = sys.modules.get("transformers")  # its model can't exist without it
    return module is not None and isinstance(model, module.PreTrainedModel)


def _is_timm(model: nn.Module) -> bool:
    module, cfg = sys.modules.get("timm"), getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else None
    return module is not None and isinstance(name, str) and bool(module.is_model(name))


def _save_timm(model: nn.Module, folder: Path, names: tuple[str, ...] | None) -> None:
    from timm.models import save_for_hf

    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    config: dict[str, Any] = {}
    if names is not None:
        config["label_names"] = list(names)
        described = cfg.get("label_descriptions") or {}
        if described := {n: d for n, d in described.items() if n in names}:
            config["label_descriptions"] = described
    save_for_hf(model, str(folder), model_config=config, safe_serialization=True)


def _copy_processor(model: nn.Module, folder: Path) -> None:
    """Copies the image processor of the folder, or of the cached repository, of the base model."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return
    file: Any = Path(name) / _PROCESSOR
    if not file.is_file():
        if Path(name).is_absolute() or name.count("/") > 1:
            return
        from huggingface_hub import try_to_load_from_cache

        revision = getattr(model.config, "_commit_hash", None)
        file = try_to_load_from_cache(name, _PROCESSOR, revision=revision)
    if isinstance(file, str | Path):
        shutil.copyfile(file, folder / _PROCESSOR)


def _base_model(model: nn.Module) -> str | None:
    """The id on a hub of what the model was built from; never a path on this machine."""
    config, cfg = getattr(model, "config", None), getattr(model, "pretrained_cfg", None)
    name = cfg.get("hf_hub_id") if isinstance(cfg, dict) else None
    if getattr(config, "_commit_hash", None):  # it was loaded from a hub
        name = getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and name.count("/") == 1 else None
