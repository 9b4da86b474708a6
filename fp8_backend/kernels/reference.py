"""The kernels in plain torch: exact semantics, any device.

Quantisation is bit for bit what the CUDA kernel computes. The GEMM multiplies the same FP8 codes in the dtype asked for
(float32 to serve, float64 to judge others), so its only error is that dtype's rounding.
"""

from __future__ import annotations

from typing import Protocol

import torch

BLOCK = 128
FP8_MAX = 448.0  # largest finite float8_e4m3fn
# Groups whose largest magnitude is below this quantise as if it were this, so that 448 / amax stays finite in float32.
MIN_AMAX = 1e-30


class Groups(Protocol):
    """What is indexed by group or expert: a tensor whose first dimension they are, or packed ones, unpacked then."""

    def __getitem__(self, group: int, /) -> torch.Tensor: ...


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def align(a: int, b: int) -> int:
    """Return a rounded up to a multiple of b."""
    return ceil_div(a, b) * b


def per_token_group_quant(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row in groups of 128 columns to e4m3 with one float32 scale a group.

    scale = amax / 448 and code = e4m3(x * (448 / amax)), both divisions in float32, amax ignoring NaN and at least
    `MIN_AMAX`. A NaN stays NaN in its code; an Inf makes its own code NaN and its group's scale Inf.

    Args:
        x: [m, k], any float dtype; columns past k in the last group count as zero.

    Returns:
        codes: [m, align(k, 128)] float8_e4m3fn, row-major; columns past k are zero.
        scale: [m, ceil(k / 128)] float32, MN-major with stride (1, align(m, 4)).
    """
    m, k = x.shape
    k_blocks = ceil_div(k, BLOCK)
    groups = torch.nn.functional.pad(x.float(), (0, k_blocks * BLOCK - k)).view(m, k_blocks, BLOCK)
    amax = groups.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=2).clamp_min(MIN_AMAX)
    # Both operands are tensors: with a number torch multiplies by a reciprocal, which rounds twice.
    largest = torch.full_like(amax, FP8_MAX)
    scaled = (groups * (largest / amax)[..., None]).clamp(-FP8_MAX, FP8_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(m, k_blocks * BLOCK)
    return codes, mn_major(amax / largest)


def mn_major(scale: torch.Tensor) -> torch.Tensor:
    """Return activation scales [m, k_blocks] float32 as the kernels read them: stride (1, align(m, 4)).

    Columns are then 16-byte aligned runs of m that a bulk copy can fetch. A tensor laid out so already is returned.
    """
    m, k_blocks = scale.shape
    m_aligned = align(m, 4)
    if scale.dtype == torch.float32 and scale.stride() == (1, m_aligned) and scale.data_ptr() % 16 == 0:
        return scale
    storage = torch.zeros(k_blocks, m_aligned, dtype=torch.float32, device=scale.device)
    storage[:, :m] = scale.t()
    return storage.t()[:m]


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, rows_per_scale: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return codes * scale.

    Args:
        codes: [rows, k] float8_e4m3fn.
        scale: [ceil(rows / rows_per_scale), ceil(k / 128)] float32.
        rows_per_scale: 1 for activations, 128 for weights.
        dtype: of the result; float32 holds every product with at most one rounding.
    """
    rows, k = codes.shape
    wide = scale.to(dtype).repeat_interleave(rows_per_scale, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :k]
    return codes.to(dtype) * wide


def fp8_gemm_nt(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return a @ b^T of block-scaled FP8 operands, plus bias, in `dtype`.

    Args:
        a: [m, k] float8_e4m3fn.
        scale_a: [m, ceil(k / 128)] float32.
        b: [n, k] float8_e4m3fn.
        scale_b: [ceil(n / 128), ceil(k / 128)] float32.
        bias: [n], any float dtype, or None.
        dtype: float32 or float64; the dtype of all arithmetic and of the result.
    """
    y = dequantize(a, scale_a, 1, dtype) @ dequantize(b, scale_b, BLOCK, dtype).t()
    return y if bias is None else y + bias.to(dtype)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the Frobenius norm of y - reference over that of reference, in float64."""
    reference = reference.double()
    return float((y.double() - reference).norm() / reference.norm().clamp_min(1e-300))


def m_grouped_contiguous(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: Groups,
    scale_b: Groups,
    out: torch.Tensor,
    m_indices: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Multiply each row by its group's weight: out[i] = a[i] @ b[m_indices[i]]^T; rows of group -1 stay as they are.

    Args:
        a: [m, k] float8_e4m3fn.
        scale_a: [m, ceil(k / 128)] float32.
        b: groups of [n, k] float8_e4m3fn.
        scale_b: groups of [ceil(n / 128), ceil(k / 128)] float32.
        out: [m, n], any float dtype; overwritten where a row has a group.
        m_indices: [m], any integer dtype.
        dtype: of all arithmetic, float32 or float64.
    """
    for group in m_indices[m_indices >= 0].unique().tolist():
        rows = (m_indices == group).nonzero()[:, 0]
        out[rows] = fp8_gemm_nt(a[rows], scale_a[rows], b[group], scale_b[group], dtype=dtype).to(out.dtype)


def m_grouped_masked(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: Groups,
    scale_b: Groups,
    out: torch.Tensor,
    masked_m: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Multiply the first masked_m[g] rows of each group g: out[g] = a[g] @ b[g]^T; rows beyond them stay as they are.

    Args:
        a: [num_groups, max_m, k] float8_e4m3fn.
        scale_a: [num_groups, max_m, ceil(k / 128)] float32.
        b: groups of [n, k] float8_e4m3fn.
        scale_b: groups of [ceil(n / 128), ceil(k / 128)] float32.
        out: [num_groups, max_m, n], any float dtype.
        masked_m: [num_groups], any integer dtype.
        dtype: of all arithmetic, float32 or float64.
    """
    for group, rows in enumerate(masked_m.tolist()):
        if rows > 0:
            y = fp8_gemm_nt(a[group, :rows], scale_a[group, :rows], b[group], scale_b[group], dtype=dtype)
            out[group, :rows] = y.to(out.dtype)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the normalised rows of x + residual, and these sums (None without a residual), both in x's dtype.

    Rounded as vLLM defines its rms_norm and fused_add_rms_norm: sums and squares in float32, the rows after they are
    scaled to a mean square of 1, and again after the weight.

    Args:
        x: [m, k], any float dtype.
        residual: likewise, or None.
        norm_weight: [k] in x's dtype.
        epsilon: added to the mean of squares.
    """
    rows = x.float() if residual is None else x.float() + residual.float()
    factor = 1 / (rows.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    normed = (rows * factor).to(x.dtype) * norm_weight
    return normed, None if residual is None else rows.to(x.dtype)


def qk_norm_rope(
    rows: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    epsilon: float,
    query_heads: int,
    key_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalised queries and keys [m, heads, head], rotated by the tokens' positions (NeoX style).

    Rounded as vLLM defines its rms_norm and RotaryEmbedding, step by step to the rows' dtype. Args: see
    `norm_rope.qk_norm_rope`; any device and float dtype.
    """
    m, head = rows.shape[0], query_weight.shape[0]
    cosine, sine = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    rotated, first = [], 0
    for heads, weight in ((query_heads, query_weight), (key_heads, key_weight)):
        part = rows[:, first : first + heads * head].reshape(m, heads, head)
        one, other = rms_norm(part, None, weight, epsilon)[0].chunk(2, dim=-1)
        rotated.append(torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1))
        first += heads * head
    return rotated[0], rotated[1]


def keep(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write keys and values of tokens that have a slot to caches of the same dtype.

    Args:
        keys: [m, heads, head].
        values: [m, heads, head].
        key_cache: [blocks, block, heads, head], any strides; overwritten where a token has a slot.
        value_cache: likewise.
        slots: [at most m] int64 of the first tokens: row s % block of block s // block, or below 0 for none.
    """
    wanted = slots >= 0
    block, row = slots[wanted] // key_cache.shape[1], slots[wanted] % key_cache.shape[1]
    for heads, cache in ((keys, key_cache), (values, value_cache)):
        cache[block, row] = heads[: len(slots)][wanted]


def silu_mul(hidden: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of [..., 2 * intermediate], gate first, in float32."""
    gate, up = hidden.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def fp8_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13: Groups,
    scale_13: Groups,
    w2: Groups,
    scale_2: Groups,
    expert_map: torch.Tensor | None = None,
    router_weight_on_input: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return each token's weighted sum of w2 @ (silu(gate) * up) over its experts; gate and up are halves of w13 @ x.

    Activations are quantised in groups of 128 before both GEMMs; everything between them and the sum stay in `dtype`.

    Args:
        x: [m, hidden], any float dtype.
        topk_weights: [m, top_k], any float dtype.
        topk_ids: [m, top_k], any integer dtype; -1 is skipped.
        w13: experts of [2 * intermediate, hidden] float8_e4m3fn, intermediate % 128 == 0.
        scale_13: experts of [2 * intermediate / 128, ceil(hidden / 128)] float32.
        w2: experts of [hidden, intermediate] float8_e4m3fn.
        scale_2: experts of [ceil(hidden / 128), intermediate / 128] float32.
        expert_map: [global experts], any integer dtype: an expert's position in w13, or -1 if another rank holds it;
            None if ids are positions already.
        router_weight_on_input: scale a token by its weight before its experts instead of after them.
        dtype: float32 to serve, float64 to judge others.

    Returns:
        [m, hidden] in x's dtype; in float64 if `dtype` is.
    """
    position = expert_positions(topk_ids, expert_map)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for expert in position[position >= 0].unique().tolist():
        token, slot = (position == expert).nonzero(as_tuple=True)
        router_weight = topk_weights[token, slot].float()[:, None]
        rows = x[token].float() * router_weight if router_weight_on_input else x[token]
        gate, up = _quantised_linear(rows, w13[expert], scale_13[expert], dtype).chunk(2, dim=1)
        hidden = (torch.nn.functional.silu(gate) * up).float()
        out = _quantised_linear(hidden, w2[expert], scale_2[expert], dtype)
        y.index_add_(0, token, out if router_weight_on_input else out * router_weight)
    return y if dtype == torch.float64 else y.to(x.dtype)


def expert_positions(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """Return the position among this rank's experts of each id, int64; -1 where it is skipped or another rank's."""
    position = topk_ids.long()
    if expert_map is None:
        return position
    # An id of -1 must not be looked up: it would find the last expert.
    return torch.where(position < 0, position, expert_map.long()[position.clamp_min(0)])


def _quantised_linear(x: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x @ b^T in `dtype` with x quantised in groups of 128."""
    codes, scale_a = per_token_group_quant(x)
    return fp8_gemm_nt(codes[:, : x.shape[1]], scale_a, b, scale_b, dtype=dtype)
