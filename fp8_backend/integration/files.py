"""The files a model is loaded from: checked before a load or reload, and named when a layer of it turns out broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fp8_backend.errors import CheckpointError
from fp8_backend.integration import compat
from fp8_backend.integration.hub import local_folder
from fp8_backend.weights.checkpoint import CheckpointSummary, verify_checkpoint
from fp8_backend.weights.deep import check_values
from fp8_backend.weights.files import open_checkpoint, read_config
from fp8_backend.weights.formats import read_format

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


@contextmanager
def naming_file(model_config: Any, prefix: str) -> Iterator[None]:
    """Add to the error of a layer that cannot be packed which file, tensor and byte is broken.

    Args:
        model_config: vLLM's, or None where it is not known.
        prefix: of the names of the layer's tensors and of those beside them.
    """
    try:
        yield
    except CheckpointError as error:
        if found := _first_broken(model_config, prefix):
            raise CheckpointError(f"{error}; broken: {found}") from error
        raise


def _first_broken(model_config: Any, prefix: str) -> str | None:
    folder = None if model_config is None else local_folder(model_config.model, model_config.revision)
    if folder is None:
        return None
    try:
        config = read_config(folder)
        findings, _ = check_values(open_checkpoint(folder, config), read_format(config), lambda _: None, prefix)
    except CheckpointError:  # the files are others by now
        return None
    return next((f"{each.file}: {each.tensor}: {each.what}" for each in findings if each.fatal), None)


def _stamp(folder: Path) -> Stamp:
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json") and path.is_file()]
    return sorted((str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in files)
