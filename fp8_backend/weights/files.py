"""The files of a checkpoint: config, index and shards, read with no more than their headers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8_backend.errors import CheckpointError
from fp8_backend.weights.safetensors_header import TensorInfo, read_header

SUFFIX = ".safetensors"
INDEX = f"model{SUFFIX}.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """What config, index and headers say; a tensor's home is the shard that holds it."""

    folder: Path
    config: dict[str, Any]
    shards: list[Path]
    info: dict[str, TensorInfo]
    home: dict[str, Path]

    @property
    def architecture(self) -> str:
        """The model class config.json names, or "unknown"."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else "unknown"


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        CheckpointError: there is no such folder or file, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; name one that holds config.json and safetensors")
    return read_json(folder / "config.json")


def open_checkpoint(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """Read the index and the header of every shard.

    Raises:
        CheckpointError: a file is absent or broken, or the index and the shards disagree.
    """
    shards, index = _find_shards(folder)
    checkpoint = Checkpoint(folder, config, shards, {}, {})
    for shard in shards:
        for name, info in read_header(shard).items():
            if name in checkpoint.home:
                raise CheckpointError(
                    f"{name}: in both {checkpoint.home[name].name} and {shard.name}; expected once; delete the stale "
                    "one"
                )
            checkpoint.info[name] = info
            checkpoint.home[name] = shard
    for name, shard_name in index.items():
        if name not in checkpoint.home or checkpoint.home[name].name != shard_name:
            raise CheckpointError(
                f"{name}: not in {shard_name}, where the index places it; fetch shard and index of one version"
            )
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object.

    Raises:
        CheckpointError: the file is absent, unreadable or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: absent; expected a complete checkpoint; fetch the file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; expected a readable file; fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__}; expected an object; fetch the file again")
    return value


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the shards vLLM would load, and the index's weight_map (empty where there is no index)."""
    for file in folder.glob(f"consolidated*{SUFFIX}"):
        raise CheckpointError(
            f"{file.name}: Mistral's own format, which vLLM loads in place of the other shards; expected none; move it "
            "out of the folder"
        )
    # A link to nothing is an index that was not fetched, not a checkpoint without one.
    if not ((folder / INDEX).is_symlink() or (folder / INDEX).exists()):
        shards = sorted(folder.glob(f"*{SUFFIX}"))
        if not shards:
            raise CheckpointError(f"{folder}: holds no *{SUFFIX} file; fetch the weights")
        _check_siblings(shards)
        return shards, {}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{INDEX}: weight_map is {str(weight_map)[:100]}; expected tensor names and files; fetch it again"
        )
    homes: dict[str, str] = {}  # one file's name -> the first tensor in it
    for tensor, shard in weight_map.items():
        # The index comes with the download: a name must not lead out of the folder.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(SUFFIX):
            raise CheckpointError(
                f"{INDEX}: {tensor} is in {shard!r}; expected a file of the same folder, *{SUFFIX}, as vLLM loads no "
                "other; fetch it again"
            )
        homes.setdefault(shard, tensor)
    for shard, tensor in homes.items():
        if not _is_file(folder / shard):
            raise CheckpointError(
                f"{shard[:100]}: absent, and the index places {tensor} in it; fetch the missing shard"
            )
    return sorted(folder / shard for shard in homes), weight_map


def _check_siblings(shards: list[Path]) -> None:
    """Check shards without an index: all files, and as many as their names say."""
    names = {shard.name for shard in shards}
    for shard in shards:
        if not _is_file(shard):
            raise CheckpointError(f"{shard.name}: not a file, or a link to none; expected a shard; fetch it")
        if not (numbered := re.fullmatch(rf"(.*-)(\d{{5}})(-of-(\d{{5}}){re.escape(SUFFIX)})", shard.name)):
            continue
        for number in range(1, int(numbered[4]) + 1):
            if (sibling := f"{numbered[1]}{number:05d}{numbered[3]}") not in names:
                raise CheckpointError(f"{sibling}: absent, and {shard.name} is there; fetch the missing shard")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system takes
        return False
