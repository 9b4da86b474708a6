"""A weight reload from files that cannot be served is refused while every layer still has its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp8_backend.errors import CheckpointError
from fp8_backend.integration import compat
from fp8_backend.integration.hub import local_folder
from fp8_backend.weights.checkpoint import CheckpointSummary, verify_checkpoint

Stamp = list[tuple[str, int, int]]


class CheckedFiles:
    """The files that were found sound last: they are not read again for each reload of the same ones."""

    def __init__(self) -> None:
        self.model = ""
        self.revision: str | None = None
        self.stamp: Stamp = []

    def check(self, model: str, revision: str | None) -> CheckpointSummary | None:
        """Check a model's files, unless they are not all there yet or have not changed since the last time.

        Raises:
            CheckpointError: see `verify_checkpoint`.
        """
        folder = local_folder(model, revision)
        stamp = [] if folder is None else _stamp(folder)
        summary = None
        if folder is not None and stamp != self.stamp:
            summary = verify_checkpoint(folder)
        self.model, self.revision, self.stamp = model, revision, stamp
        return summary

    def check_reload(self, model_config: Any) -> None:
        """Check the files that a weight reload is about to read; where they fail, put everything back.

        Args:
            model_config: vLLM's, which a reload from another path has pointed there.

        Raises:
            CheckpointError: see `verify_checkpoint`.
        """
        try:
            self.check(model_config.model, model_config.revision)
        except CheckpointError as error:
            compat.undo_reload()
            if self.model:
                model_config.model, model_config.revision = self.model, self.revision
            raise CheckpointError(f"{error}; nothing was reloaded, the weights are those of before") from error


def _stamp(folder: Path) -> Stamp:
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json") and path.is_file()]
    return sorted((str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in files)
