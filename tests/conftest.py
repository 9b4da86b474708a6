"""Skip, with the reason printed, the tests this machine cannot run."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _why_no_hopper() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "needs a Hopper GPU (9, 0); torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"needs a Hopper GPU (9, 0); torch {torch.__version__} sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"needs a Hopper GPU (9, 0); found {torch.cuda.get_device_name()} {capability}"
    return None


def _why_no_vllm() -> str | None:
    return None if importlib.util.find_spec("vllm") is not None else "needs vLLM; vllm is not installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, why_not in (("gpu", _why_no_hopper), ("vllm", _why_no_vllm)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := why_not()) is not None:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def caplog_vllm() -> Iterator[list[str]]:
    """Collect what is logged under `vllm`, a logger that does not propagate to the one pytest listens to."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)  # vLLM sets it when an engine starts, not when it is imported
    yield lines
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a bf16 checkpoint of two layers, one of them with four experts."""
    from dataclasses import replace

    from demo.architectures import SIZES
    from demo.checkpoint import dequantize_checkpoint, write_checkpoint

    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder / "fp8", "qwen3_moe", replace(SIZES["qwen3_moe", "demo"], layers=2, experts=4))
    dequantize_checkpoint(folder / "fp8", folder / "bf16")
    return folder / "bf16"


@pytest.fixture(scope="session")
def warm_cache_and_said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Fill a cache with every kernel, as `fp8-backend cache warm` does it for an image; return it and what was said."""
    directory = tmp_path_factory.mktemp("warm") / "cache"
    environ = {**os.environ, "FP8_BACKEND_CACHE_DIR": str(directory), "FP8_BACKEND_JIT": "auto"}
    command = [sys.executable, "-m", "fp8_backend.cli", "cache", "warm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, check=True)
    return directory, done.stdout


@pytest.fixture(scope="session")
def warm_cache(warm_cache_and_said: tuple[Path, str]) -> Path:
    return warm_cache_and_said[0]


@pytest.fixture(scope="session")
def warm_cache_said(warm_cache_and_said: tuple[Path, str]) -> str:
    return warm_cache_and_said[1]


@pytest.fixture(scope="session")
def one_rank() -> Iterator[VllmConfig]:
    """Initialise vLLM's process groups for a single rank and give a config for layers built without an engine."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel, parallel_state
    from vllm.utils.network_utils import get_open_port

    config = VllmConfig(device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config):
        parallel_state.init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, "gloo")
        parallel_state.initialize_model_parallel()
    yield config
    destroy_model_parallel()
    destroy_distributed_environment()
