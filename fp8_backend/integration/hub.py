"""Where a model that is named, and not a folder, lies on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fp8_backend.weights.files import INDEX

SINGLE = "model.safetensors"


def local_folder(model: str, revision: str | None) -> Path | None:
    """Return the folder that holds all weights of a model already, or None; nothing is ever downloaded.

    A name is looked up in Hugging Face's cache, where vLLM keeps what it fetched. None is returned where files are yet
    to come (the index names shards that are not there), for other hubs, and for a cache that was moved by
    `--download-dir`: layers are then checked one by one as they are packed.

    Args:
        model: what `--model` says.
        revision: branch, tag or commit; None for the default branch.
    """
    folder = Path(model)
    if folder.is_dir():
        # A folder without weights (a config alone, for --load-format dummy) has nothing to check.
        return folder if any(folder.glob("*.safetensors*")) else None
    if os.path.isabs(model):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # not a name of that hub: object storage, say
        return None
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    if not (folder / INDEX).is_file():
        return (folder / SINGLE).is_file()
    try:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        return all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return True  # there, and broken: `open_checkpoint` says how
