"""Files that list the names of a model's classes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

_INDEXED = re.compile(r"([0-9]+)\s*[:,;\t ]\s*(\S.*)")


def parse_class_names(path: str | Path) -> Any:
    """Returns the list or dict of names in a text or JSON file; see `read_class_names`.

    Raises:
        ArgumentError: the file can't be read, or numbers its lines in another way than 0, 1, ...
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "class_names",
            f"{path} can't be read ({error})",
            "Pass a text file with one name per line, or a JSON file.",
        ) from error
    if text.lstrip()[:1] in ("{", "["):
        return _from_json(text, path)
    lines = [line.strip() for line in text.strip("\r\n").splitlines()]
    if "" in lines:
        raise ArgumentError(
            "class_names",
            f"line {lines.index('') + 1} of {path} is empty, so the order is not certain",
            "Give each class a line, in the order of the logits.",
        )
    found = [_INDEXED.fullmatch(line) for line in lines]
    matches = [match for match in found if match is not None]
    if not lines or len(matches) < len(lines):
        return lines
    numbered = {int(match[1]): match[2] for match in matches}
    if len(numbered) < len(lines) or sorted(numbered) != list(range(len(lines))):
        raise ArgumentError(
            "class_names",
            f"the {len(lines)} lines of {path} are numbered {min(numbered)} to {max(numbered)}",
            f"Number them 0 to {len(lines) - 1}, as the model's logits, or not at all; names that "
            f"begin with a number can be given as a JSON list.",
        )
    return [numbered[index] for index in range(len(lines))]


def _from_json(text: str, path: str | Path) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition)
    except ValueError as error:
        raise ArgumentError(
            "class_names", f"{path} is not valid JSON ({error})", "Pass a list of names."
        ) from error
    if isinstance(value, dict) and isinstance(value.get("id2label"), dict):
        value = value["id2label"]
    if isinstance(value, dict):  # Keras's imagenet_class_index.json
        return {k: " ".join(v) if _is_pair(v) else v for k, v in value.items()}
    return [" ".join(v) if _is_pair(v) else v for v in value]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found
