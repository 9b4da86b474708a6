"""The only file that knows vLLM versions: what differs from 0.26 to 0.33, and the failure each cure was written for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

OLDEST, NEWEST = (0, 26), (0, 33)
TESTED = f"vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


def untested_version(version: str | None = None) -> str | None:
    """Return a sentence about a vLLM that this package was never run with, or None; by default the one imported."""
    if version is None:
        import vllm

        version = vllm.__version__
    match = re.match(r"(\d+)\.(\d+)", version)
    if match and OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        return None
    return f"fp8_backend was not tested with vLLM {version}; tested: {TESTED}"


def is_skipped(config: Fp8Config, prefix: str) -> bool:
    """Return whether the checkpoint keeps a layer unquantised.

    0.26 fails on `match_mode=` with "unexpected keyword argument", and its config has no `ignored_layers_match_mode`;
    from 0.32 on a config may ask for another match than the exact one.
    """
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    mode = getattr(config, "ignored_layers_match_mode", None)
    match = {} if mode is None else {"match_mode": mode}
    return is_layer_skipped(
        prefix=prefix, ignored_layers=config.ignored_layers, fused_mapping=config.packed_modules_mapping, **match
    )


def keep_from_amx_mla(layer: torch.nn.Module) -> None:
    """Make MLA on a CPU with AMX take a packed `kv_b_proj` through the layer's own method.

    From 0.32 on AMXMLAImpl reads an e4m3 weight that has a `weight_block_size` as a plain [n, k] matrix: "ValueError:
    too many values to unpack (expected 2)"; it would also requantise it with one scale per tensor. Without the
    attribute it multiplies an identity by the layer, as MLA does on GPUs. vLLM's mark tells the layers it reads from
    all others, which keep the attribute for later weight updates.
    """
    if getattr(layer, "_cpu_skip_gemm_dispatch", False):
        layer.weight_block_size = None
