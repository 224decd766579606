"""Impressions on disk: finished shards are kept, so that a run that was cut off goes on.

A shard is a fixed set of impressions that depends on nothing outside it: made again, it has the
same bits, and so has a run that was resumed. The folder's name is a hash of everything that the
impressions depend on: another model or setting never finds them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, CheckpointError, OutputError
from ..models import checkpoint


class Cache:
    """Finished shards of one set of impressions.

    Args:
        folder: where caches live; made if it is not there.
        facts: everything that the impressions depend on, as plain values.

    Raises:
        ArgumentError: ``folder`` is no path.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any]) -> None:
        if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
            raise ArgumentError("cache", f"got {folder!r}", "Pass the path of a folder, or None.")
        text = json.dumps(facts, sort_keys=True)
        self.facts = text
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._writing = True

    def load(self, shard: int) -> dict[str, Tensor] | None:
        """The tensors of a shard; None where it is missing, or damaged and to be made anew."""
        path = self._path(shard)
        if not path.is_file():
            return None
        try:
            tensors, metadata = checkpoint.load_tensors(path)
        except CheckpointError as error:
            warnings.warn(f"cache: {error} It is made anew.", stacklevel=2)
            return None
        return tensors if metadata.get("facts") == f"{self.facts} {shard}" else None

    def save(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """Keeps a shard, atomically. Where that fails, the run goes on without the cache."""
        if not self._writing:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = {"facts": f"{self.facts} {shard}"}  # one entry: the order of two is by chance
            checkpoint.save_tensors(self._path(shard), tensors, own, force=True)
        except (OSError, OutputError) as error:
            self._writing = False
            warnings.warn(
                f"cache: nothing more is kept in {self.folder}, it can't be written ({error}). "
                f"The run goes on.",
                stacklevel=2,
            )

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.safetensors"
