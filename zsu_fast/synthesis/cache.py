"""Stores finished shards of impressions on disk, so that an interrupted run can resume.

A shard is a fixed set of impressions that depends on nothing outside it: computed again, it has the
same bits, and so has a resumed run. The folder's name is a hash of everything that the impressions
depend on, so that another model or setting never finds them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, CheckpointError, OutputError, UnlearningWarning
from ..models import checkpoint


class Cache:
    """Finished shards of one set of impressions.

    Args:
        folder: holds the caches of all runs; created if missing.
        facts: everything that the impressions depend on, as JSON values.

    Raises:
        ArgumentError: ``folder`` is not a path.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any]) -> None:
        if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
            raise ArgumentError("cache", f"got {folder!r}", "Pass the path of a folder, or None.")
        self.facts = json.dumps(facts, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(self.facts.encode()).hexdigest()[:32]
        self._writing = True

    def load(self, shard: int) -> dict[str, Tensor] | None:
        """The tensors of a shard; None if it is missing, damaged, or of another run."""
        path = self._path(shard)
        if not path.is_file():
            return None
        try:
            tensors, metadata = checkpoint.load_tensors(path)
        except CheckpointError as error:
            warnings.warn(f"cache: {error} It is made anew.", UnlearningWarning, stacklevel=2)
            return None
        return tensors if metadata.get("facts") == f"{self.facts} {shard}" else None

    def save(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """Stores a shard, atomically. If that fails, it warns, and stores no more."""
        if not self._writing:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            metadata = {"facts": f"{self.facts} {shard}"}  # one entry: two have no fixed order
            checkpoint.save_tensors(self._path(shard), tensors, metadata, force=True)
        except (OSError, OutputError) as error:
            self._writing = False
            warnings.warn(
                f"cache: {self.folder} can't be written ({error}): nothing more is stored there. "
                f"The run goes on.",
                UnlearningWarning,
                stacklevel=2,
            )

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}.safetensors"
