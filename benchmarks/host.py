"""Host time of an eager call of the linear op: 1000 calls issued without synchronising."""

from __future__ import annotations

import time

import torch

from fp8_backend.kernels import gemm, layout


def main() -> None:
    """Print microseconds of CPU time a call for a few token counts."""
    n, k = 512, 512
    codes = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    packed, scale = layout.pack_weight(codes), layout.pack_scale(torch.ones(4, 4, device="cuda"), n, k)
    for m in (1, 16, 64, 128):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        for _ in range(100):
            gemm.fp8_linear(x, packed, scale, n)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(1000):
            gemm.fp8_linear(x, packed, scale, n)
        spent = time.perf_counter() - start
        torch.cuda.synchronize()
        print(f"m={m}: {spent * 1e3:.1f} us a call")


if __name__ == "__main__":
    main()
