"""Grouped GEMMs with DeepGEMM's arguments: rows sorted by group (contiguous), or a block of rows a group (masked)."""

from __future__ import annotations

import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import layout, reference
from fp8_backend.kernels.backend import is_current, runs_cuda_kernels
from fp8_backend.kernels.expert_weights import (
    UnpackedCodes,
    UnpackedScales,
    arrange_expert_scales,
    pack_expert_scales,
    pack_experts,
)
from fp8_backend.kernels.grouped import launch_contiguous
from fp8_backend.kernels.masked import launch_masked
from fp8_backend.kernels.quantize import ELEMENT_TYPES
from fp8_backend.kernels.reference import BLOCK, align, ceil_div

Pair = tuple[torch.Tensor, torch.Tensor]


def m_grouped_fp8_gemm_nt_contiguous(a: Pair, b: Pair, out: torch.Tensor, m_indices: torch.Tensor) -> None:
    """Multiply each row by the weight of its group: out[i] = a[i] @ b[m_indices[i]]^T.

    Rows of one group are neighbours, in any number: groups need not be padded to 128 rows, though they may be, with
    rows of group -1, of which nothing is written.

    Args:
        a: codes [m, k] float8_e4m3fn and scale [m, ceil(k / 128)] float32 (any strides; MN-major with stride
            (1, align(m, 4)), as `per_token_group_quant` gives it, is not copied).
        b: codes [num_groups, n, k] float8_e4m3fn, or packed by `pack_experts`, and scale [num_groups, ceil(n / 128),
            ceil(k / 128)] float32, or packed by `pack_expert_scales`. On a GPU each call packs and waits for what is
            not packed: pack once, at load.
        out: [m, n] bfloat16, contiguous columns.
        m_indices: [m] int32 group of each row, ascending but for -1.

    Raises:
        ArgumentError: a dtype or shape that does not fit; on a GPU also k % 128 != 0, and operands that are not packed
            while a graph is captured.
        UnsupportedError: the tensors are on a GPU for which there are no kernels.
    """
    (codes, scale_a), n = a, out.shape[-1]
    if out.is_cuda and not is_current(out.device):
        with torch.cuda.device(out.device):
            return m_grouped_fp8_gemm_nt_contiguous(a, b, out, m_indices)
    weight, scale_b = _check(codes, scale_a, b, out, 2)
    if m_indices.shape != codes.shape[:1] or m_indices.dtype != torch.int32:
        raise ArgumentError(
            f"m_indices: got {tuple(m_indices.shape)} {m_indices.dtype}; expected ({codes.shape[0]},) int32"
        )
    if not runs_cuda_kernels(out.device):
        groups, scales = _plain(weight, scale_b, n, codes.shape[1])
        reference.m_grouped_contiguous(codes, scale_a, groups, scales, out, m_indices)
    elif out.numel():
        launch_contiguous(codes, reference.mn_major(scale_a), weight, scale_b, out, m_indices)


def m_grouped_fp8_gemm_nt_masked(a: Pair, b: Pair, out: torch.Tensor, masked_m: torch.Tensor, expected_m: int) -> None:
    """Multiply the first masked_m[g] rows of each group: out[g] = a[g] @ b[g]^T; of the others nothing is written.

    Args:
        a: codes [num_groups, max_m, k] float8_e4m3fn and scale [num_groups, max_m, ceil(k / 128)] float32 (any strides;
            with stride (k_blocks * align(max_m, 4), 1, align(max_m, 4)) it is not copied).
        b: as `m_grouped_fp8_gemm_nt_contiguous` takes it.
        out: [num_groups, max_m, n] bfloat16, contiguous.
        masked_m: [num_groups] int32, on the device; it is not waited for.
        expected_m: rows a group that are likely, which chooses the kernel and changes no result beyond rounding.

    Raises:
        ArgumentError: a dtype or shape that does not fit; on a GPU also k % 128 != 0, and operands that are not packed
            while a graph is captured.
        UnsupportedError: the tensors are on a GPU for which there are no kernels.
    """
    (codes, scale_a), n = a, out.shape[-1]
    if out.is_cuda and not is_current(out.device):
        with torch.cuda.device(out.device):
            return m_grouped_fp8_gemm_nt_masked(a, b, out, masked_m, expected_m)
    weight, scale_b = _check(codes, scale_a, b, out, 3)
    if masked_m.shape != codes.shape[:1] or masked_m.dtype != torch.int32:
        raise ArgumentError(
            f"masked_m: got {tuple(masked_m.shape)} {masked_m.dtype}; expected ({codes.shape[0]},) int32"
        )
    if not runs_cuda_kernels(out.device):
        groups, scales = _plain(weight, scale_b, n, codes.shape[2])
        reference.m_grouped_masked(codes, scale_a, groups, scales, out, masked_m)
    elif out.numel():
        launch_masked(codes, mn_major_groups(scale_a), weight, scale_b, out, masked_m, expected_m)


def mn_major_groups(scale: torch.Tensor) -> torch.Tensor:
    """Return scales [num_groups, max_m, k_blocks] float32, each group's laid out as by `reference.mn_major`."""
    num_groups, max_m, k_blocks = scale.shape
    m_aligned = align(max_m, 4)
    if scale.stride() == (k_blocks * m_aligned, 1, m_aligned) and scale.data_ptr() % 16 == 0:
        return scale
    storage = torch.zeros(num_groups, k_blocks, m_aligned, dtype=torch.float32, device=scale.device)
    storage[:, :, :max_m] = scale.transpose(1, 2)
    return storage.transpose(1, 2)[:, :max_m]


def _check(codes: torch.Tensor, scale_a: torch.Tensor, b: Pair, out: torch.Tensor, dims: int) -> Pair:
    """Check what both forms have in common; return the weight and its scales, packed."""
    (weight, scale_b), k, n = b, codes.shape[-1], out.shape[-1]
    num_groups = weight.shape[0]
    shapes = {(num_groups, n, k), (num_groups, *layout.packed_weight_shape(n, k))}
    fits = codes.dim() == out.dim() == dims and codes.shape[:-1] == out.shape[:-1]
    if not fits or codes.dtype != torch.float8_e4m3fn or out.dtype not in ELEMENT_TYPES:
        raise ArgumentError(
            f"a, out: got {tuple(codes.shape)} {codes.dtype} and {tuple(out.shape)} {out.dtype}; expected "
            f"{'[m' if dims == 2 else '[num_groups, max_m'}, k] float8_e4m3fn and as many rows of bfloat16"
        )
    if tuple(scale_a.shape) != (*codes.shape[:-1], ceil_div(k, BLOCK)) or scale_a.dtype != torch.float32:
        raise ArgumentError(
            f"scale_a: got {tuple(scale_a.shape)} {scale_a.dtype}; expected "
            f"{(*codes.shape[:-1], ceil_div(k, BLOCK))} float32, one for every 128 columns"
        )
    if tuple(weight.shape) not in shapes or (dims == 3 and num_groups != codes.shape[0]):
        raise ArgumentError(f"b: got {tuple(weight.shape)}; expected one of {sorted(shapes)} for out of {n} columns")
    plain_scale = tuple(scale_b.shape) != (num_groups, *layout.packed_scale_shape(n, k))
    if not runs_cuda_kernels(out.device):
        return weight, arrange_expert_scales(scale_b, n, k) if plain_scale else scale_b
    if k % BLOCK:
        raise ArgumentError(f"k={k} is not a multiple of {BLOCK}; pad the columns of a and b with zero codes")
    if (plain_scale or weight.dim() == 3) and torch.cuda.is_current_stream_capturing():
        raise ArgumentError("b is not packed, and packing cannot be captured; call pack_experts and pack_expert_scales")
    # The kernels fetch both before earlier work of the stream has ended: packing waits for its own.
    weight = pack_experts(weight.clone()) if weight.dim() == 3 else weight
    return weight, pack_expert_scales(scale_b, n, k) if plain_scale else scale_b


def _plain(weight: torch.Tensor, scale_b: torch.Tensor, n: int, k: int) -> tuple[reference.Groups, reference.Groups]:
    return (UnpackedCodes(weight, n, k) if weight.dim() == 4 else weight), UnpackedScales(scale_b, n)
