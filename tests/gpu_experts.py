"""Weights of experts and routings on a GPU, as the GPU tests of more than one form of the op take them."""

from __future__ import annotations

import torch

from fp8_backend.kernels import layout
from fp8_backend.kernels.reference import BLOCK, ceil_div

# Rounding to bfloat16 of each row and of the sum: 0.0017 each. The tensor core keeps about 14 bits inside a k-block:
# now and then a code between the GEMMs is its neighbour, with few columns to average over 0.005 in all (seen: 0.0052).
LIMIT = 0.008


def make_weights(num_groups, n, k):
    """Return codes, scales, and both packed."""
    codes = (torch.randn(num_groups, n, k, device="cuda") * 32).to(torch.float8_e4m3fn)
    scale = torch.rand(num_groups, ceil_div(n, BLOCK), ceil_div(k, BLOCK), device="cuda") * 0.002 + 0.001
    packed = torch.stack([layout.pack_weight(w).view(torch.uint8) for w in codes]).view(torch.float8_e4m3fn)
    return codes, scale, packed, torch.stack([layout.pack_scale(s, n, k) for s in scale])


def draw_routing(kind, m, top_k, num_ids):
    """Return router weights and ids: "even", all of "one" expert, of "few", or with many "skipped"."""
    weights = torch.rand(m, top_k, device="cuda")
    ids = torch.rand(m, num_ids, device="cuda").topk(top_k, dim=1).indices.int()
    if kind == "skipped":
        ids[torch.rand(m, top_k, device="cuda") < 0.4] = -1
        ids[0] = -1
    elif kind == "one":
        ids[:] = 1
    elif kind == "few":
        ids %= 2
    return weights, ids
