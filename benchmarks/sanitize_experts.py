"""What `python -m benchmarks.sanitize` launches of the experts: every form, on small odd numbers of tokens and rows."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import torch

from fp8_backend.bench.moe_operands import RandomExperts
from fp8_backend.bench.moe_shapes import MoeShape, route
from fp8_backend.kernels import experts, experts_prefill_plan, masked, reference
from fp8_backend.kernels.activation import masked_silu_mul_quant
from fp8_backend.kernels.expert_weights import pack_expert_scales, pack_experts
from fp8_backend.kernels.grouped import TALL_ROWS
from fp8_backend.kernels.m_grouped import m_grouped_fp8_gemm_nt_contiguous, m_grouped_fp8_gemm_nt_masked

Weights = tuple[torch.Tensor, torch.Tensor]  # codes and scales of all groups
SHAPE = MoeShape("odd", 5, 384, 128, 2)
# Tokens of each form: those that change the kernel, and a partial tile behind a full one.
TOKENS: dict[experts.Form, tuple[int, ...]] = {
    "single": (1, 3, 8),
    "decode": (1, 3, 7, 13, 40),
    "joint": (3, 40, 170),  # 68 rows an expert at the last: two tiles
    "prefill": (3, 70, 300),
}
LIMIT = 0.02  # as tests/test_experts_gpu.py has it
N, K = 264, 9 * 128  # more k-blocks than stages


def launches() -> Iterator[str]:
    """Launch the experts in every form and the grouped GEMMs; yield what was launched, its result compared."""
    layer = RandomExperts(SHAPE, torch.device("cpu"), copies=1)
    for form, numbers in TOKENS.items():
        for tokens in numbers:
            for on_input in (False,) if form == "single" else (False, True):
                yield _experts(layer, form, tokens, on_input)
    with patch.multiple(experts_prefill_plan, SORTED_ROWS=0, SORTED_INTERMEDIATE=0):
        for tokens in (*TOKENS["prefill"], 340):  # of 130 to 140 rows an expert, some are extended tiles
            yield f"{_experts(layer, 'prefill', tokens, False)}, rows sorted"
    codes = (torch.randn(4, N, K) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(4, 3, K // 128) / 500
    packed = pack_experts(codes.clone()).cuda(), pack_expert_scales(scale, N, K).cuda()
    for counts in ((3, 0, 17, 1), (0, 130, 0, 70), (0, 4 * TALL_ROWS, 3, 0)):
        yield _contiguous(counts, (codes, scale), packed)
    for expected_m, counts in ((1, (3, 0, 17, 1)), (64, (0, 70, 1, 33)), (masked.TALL_ROWS, (0, 70, 1, 33))):
        yield _masked(expected_m, counts, (codes, scale), packed)


def _experts(layer: RandomExperts, form: experts.Form, tokens: int, on_input: bool) -> str:
    x = torch.randn(tokens, SHAPE.hidden).to(torch.bfloat16)
    topk_weights, topk_ids = route(SHAPE, tokens, "balanced", tokens)
    topk_ids[0, 1] = -1
    expert_map = torch.tensor([4, 3, -1, 1, 0], dtype=torch.int32)
    plain, packed = layer.plain[0], layer.ours[0]
    truth = reference.fp8_experts(
        x, topk_weights, topk_ids, plain.w13, plain.scale_13, plain.w2, plain.scale_2, expert_map, on_input
    )
    out = torch.full_like(x, float("nan")).cuda()
    weights = (packed.w13.cuda(), packed.scale_13.cuda(), packed.w2.cuda(), packed.scale_2.cuda())
    torch.cuda.synchronize()
    given = (x.cuda(), topk_weights.cuda(), topk_ids.cuda(), *weights, out, expert_map.cuda(), on_input)
    experts.launch(form, *given)
    name = f"experts, {form}, {tokens} tokens{', weights on input' if on_input else ''}"
    assert reference.relative_error(out.cpu(), truth) < LIMIT, name
    return name


def _contiguous(counts: tuple[int, ...], plain: Weights, packed: Weights) -> str:
    m_indices = torch.tensor([group for group, count in enumerate(counts) for _ in range(count)], dtype=torch.int32)
    a = reference.per_token_group_quant(torch.randn(len(m_indices), K))
    truth, out = torch.zeros(len(m_indices), N), torch.full((len(m_indices), N), float("nan"))
    reference.m_grouped_contiguous(*a, plain[0], plain[1], truth, m_indices)
    out = out.to(torch.bfloat16).cuda()
    m_grouped_fp8_gemm_nt_contiguous((a[0].cuda(), _on_gpu(a[1])), packed, out, m_indices.cuda())
    assert reference.relative_error(out.cpu(), truth) < LIMIT, counts
    return f"contiguous {counts}"


def _masked(expected_m: int, counts: tuple[int, ...], plain: Weights, packed: Weights) -> str:
    hidden = torch.randn(4, 70, 2 * K).to(torch.bfloat16)
    masked_m = torch.tensor(counts, dtype=torch.int32)
    a = masked_silu_mul_quant(hidden.cuda(), masked_m.cuda())
    codes, scale = (tensor.cpu() for tensor in a)
    truth = torch.zeros(4, 70, N)
    reference.m_grouped_masked(codes, scale, plain[0], plain[1], truth, masked_m)
    out = torch.full((4, 70, N), float("nan")).to(torch.bfloat16).cuda()
    m_grouped_fp8_gemm_nt_masked(a, packed, out, masked_m.cuda(), expected_m)
    for group, rows in enumerate(counts):
        assert not rows or reference.relative_error(out[group, :rows].cpu(), truth[group, :rows]) < LIMIT, counts
    return f"activation and masked {counts}, {expected_m} expected"


def _on_gpu(scale: torch.Tensor) -> torch.Tensor:
    """Return MN-major scales with their strides: no kernel of torch's arranges them again."""
    return scale.t().contiguous().cuda().t() if scale.shape[0] % 4 == 0 else reference.mn_major(scale.cuda())
