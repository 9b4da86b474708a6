"""Skip, with the reason printed, the tests this machine cannot run."""

from __future__ import annotations

import importlib.util

import pytest


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
