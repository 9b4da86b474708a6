"""The experts op for many tokens: rows sorted by expert, two grouped GEMMs over the real row counts, one sum."""

from __future__ import annotations

from functools import cache

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import grouped, launcher, quantize_sorted, routing
from fp8_backend.kernels.backend import num_sms
from fp8_backend.kernels.compiler import KernelSpec
from fp8_backend.kernels.quantize import ELEMENT_TYPES, per_token_group_quant
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

_COMBINE = KernelSpec("combine.cuh", "combine")
_COMBINE_LAYOUT = launcher.ParamLayout(("u64",) * 5 + ("i64",) + ("u32",) * 5)
_COMBINE_THREADS, _COMBINE_COLUMNS = 256, 256 * 8
_LIKELY_ENTRIES = 2  # entries an expert, from which on most experts have some


def all_specs() -> tuple[KernelSpec, ...]:
    """Return every kernel this form needs beside quantize.cuh."""
    return (*grouped.all_specs(), quantize_sorted.SPEC, _COMBINE)


def load_all() -> None:
    """Load every kernel on torch's current device."""
    device = torch.cuda.current_device()
    grouped.load_all()
    quantize_sorted.kernel(device)
    _combine_kernel(device)


@cache
def _combine_kernel(device: int) -> launcher.Kernel:
    return launcher.load(_COMBINE, _COMBINE_LAYOUT)


def experts_prefill_workspace_bytes(
    m: int, top_k: int, hidden: int, intermediate: int, num_groups: int, router_weight_on_input: bool = False
) -> int:
    """Return the bytes of all tensors that `experts_prefill` allocates for 16-bit activations and int32 ids."""
    entries, k_blocks = m * top_k, ceil_div(hidden, BLOCK)
    rows = entries if router_weight_on_input else m
    weighted = entries * hidden * 4 if router_weight_on_input else 0
    quantised = k_blocks * (rows * BLOCK + align(rows, 4) * 4)
    between = entries * intermediate + intermediate // BLOCK * align(entries, 4) * 4
    return weighted + quantised + routing.routing_bytes(entries, num_groups) + between + entries * hidden * 2


def experts_prefill(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: torch.Tensor,
    scale_13: torch.Tensor,
    w2: torch.Tensor,
    scale_2: torch.Tensor,
    out: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    router_weight_on_input: bool = False,
) -> None:
    """Write each token's weighted sum of w2 @ (silu(gate) * up) over its experts; gate and up are halves of w13 @ x.

    Five kernels: quantise, route, gated GEMM, GEMM, combine. Nothing waits for the GPU; the same inputs give the same
    bits. Shapes are not checked.

    Args:
        x: [m, hidden] bfloat16 or float16, contiguous columns, hidden % 8 == 0.
        topk_weights: [m, top_k] float32.
        topk_ids: [m, top_k] int32 or int64; -1 is skipped.
        w13: [num_groups, ceil(hidden / 128), 2 * intermediate, 128] packed, intermediate % 128 == 0.
        scale_13: packed scales of w13.
        w2: [num_groups, intermediate / 128, align(hidden, 8), 128] packed.
        scale_2: packed scales of w2.
        out: [m, hidden] in x's dtype, 16-byte aligned rows; overwritten.
        expert_map: [global experts] int32: an expert's position in w13 or -1; None if ids are positions.
        router_weight_on_input: scale a token by its weight before its experts instead of after them.

    Raises:
        ArgumentError: hidden % 8 != 0, rows of out that are not 16-byte aligned, or more than 1024 experts.
    """
    (m, hidden), top_k, num_groups, intermediate = x.shape, topk_ids.shape[1], w13.shape[0], w13.shape[2] // 2
    if hidden % 8 or out.stride(0) % 8 or out.data_ptr() % 16:
        raise ArgumentError(
            f"hidden={hidden}, out's row stride {out.stride(0)} and address {out.data_ptr():#x}; the combining kernel "
            "takes multiples of 8 and a 16-byte aligned out; pad hidden with zero columns"
        )
    if m == 0 or top_k == 0:
        out.zero_()
        return
    device, entries = x.device, m * top_k
    ids, weights = topk_ids.to(torch.int32).contiguous(), topk_weights.float().contiguous()
    map_here = None if expert_map is None else expert_map.to(torch.int32).contiguous()
    if router_weight_on_input:
        codes, scale = per_token_group_quant((x.float()[:, None] * weights[:, :, None]).view(entries, hidden))
    else:
        codes, scale = per_token_group_quant(x)
    routed = routing.route(ids, map_here, num_groups)
    between = torch.empty((entries, intermediate), dtype=torch.uint8, device=device)
    between_scale = torch.empty((intermediate // BLOCK, align(entries, 4)), dtype=torch.float32, device=device)
    divisor = 1 if router_weight_on_input else top_k
    likely = num_groups if _LIKELY_ENTRIES * num_groups <= entries <= routing.TILE_ROWS * num_groups else 0
    gated = grouped.GATED, codes, scale.t(), w13, scale_13, between, between_scale, intermediate
    grid = grouped.launch_grouped(*gated, routed, divisor, likely)
    # A CTA fills its multiprocessor: where there are so many, the next kernel's start when one has ended, and it had
    # waited for the routing. Elsewhere they may start before the tiles are listed.
    listed = int(grid == num_sms(device.index))
    rows = torch.empty((entries, hidden), dtype=x.dtype, device=device)
    plain = grouped.PLAIN, between, between_scale, w2, scale_2, rows, None, hidden
    grouped.launch_grouped(*plain, routed, early=listed)
    _combine(ids, map_here, None if router_weight_on_input else weights, rows, out, num_groups)


def _combine(
    ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    weights: torch.Tensor | None,
    rows: torch.Tensor,
    out: torch.Tensor,
    num_groups: int,
) -> None:
    m, hidden = out.shape
    _combine_kernel(out.device.index).launch(
        (m, ceil_div(hidden, _COMBINE_COLUMNS), 1),
        _COMBINE_THREADS,
        0,
        (
            ids.data_ptr(),
            0 if expert_map is None else expert_map.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            rows.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            ids.shape[1],
            hidden,
            0 if expert_map is None else expert_map.numel(),
            num_groups,
            ELEMENT_TYPES[out.dtype],
        ),
        launcher.current_stream(out.device.index),
        pdl=True,
    )
