"""What a grid of well-behaved inputs does not show; a part of `python -m benchmarks.correctness`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.operands import DEVICE, DeepGemm, RandomWeight, row
from fp8_backend.kernels import reference
from fp8_backend.kernels.quantize import per_token_group_quant
from fp8_backend.measure.environment import write_json

MS = (1, 3, 17, 64, 127, 128, 129, 1000, 4096)
SHAPES = ((2112, 7168), (576, 2048), (1000, 640), (200, 300))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = (66_000, 32_768, 128)  # m, n, k of an output of 2.16e9 elements
CHUNK = 4096  # rows of the large output compared at a time: 1 GiB of float64
Rows = Iterator[dict[str, Any]]
Case = Callable[[int, RandomWeight, DeepGemm], Rows]


def normal(m: int, k: int) -> torch.Tensor:
    """Return activations [m, k] bfloat16."""
    return torch.randn(m, k, device=DEVICE).to(torch.bfloat16)


def check(case: str, m: int, n: int | None, k: int, holds: bool) -> dict[str, Any]:
    """Return a row that says whether something exact holds."""
    return {"m": m, "n": n, "k": k, "case": case, "verified": holds}


def outliers(m: int, weight: RandomWeight, deepgemm: DeepGemm) -> Rows:
    """Raise one channel a thousandfold."""
    x = normal(m, weight.k)
    x[:, weight.k // 3] *= 1000
    truth, (codes, scale) = weight.truth(x), per_token_group_quant(x)
    peer = deepgemm.multiply(weight, codes, scale, demanded=False)
    peer_error = None if peer is None else reference.relative_error(peer, truth)
    for name, y in (("linear", weight.linear(x)), ("gemm", weight.multiply(codes, scale, packed=True))):
        yield row(
            f"outliers: one channel x1000, {name}",
            m,
            weight.n,
            weight.k,
            reference.relative_error(y, truth),
            peer_error,
        )


def zero_rows(m: int, weight: RandomWeight, deepgemm: DeepGemm) -> Rows:
    """Set every second row to zero: its output is exactly zero."""
    x = normal(m, weight.k)
    x[::2] = 0
    y = weight.linear(x)
    yield check("zero rows: output exactly zero", m, weight.n, weight.k, bool((y[::2] == 0).all()))
    yield row("zero rows", m, weight.n, weight.k, reference.relative_error(y, weight.truth(x)))


def non_finite(m: int, weight: RandomWeight, deepgemm: DeepGemm) -> Rows:
    """Put a NaN and an Inf into two rows: their outputs hold no finite value, the others only finite ones."""
    x = normal(m, weight.k)
    bad = torch.zeros(m, dtype=torch.bool, device=DEVICE)
    bad[0] = bad[m // 2] = True
    x[0, 5], x[m // 2, weight.k - 1] = float("nan"), float("inf")
    truth = weight.truth(x[~bad])
    codes, scale = per_token_group_quant(x)
    for name, y in (("linear", weight.linear(x)), ("gemm", weight.multiply(codes, scale, packed=True))):
        finite = y.isfinite()
        exact = not bool(finite[bad].any()) and bool(finite[~bad].all())
        yield check(f"NaN and Inf: non-finite exactly where the input row is, {name}", m, weight.n, weight.k, exact)
        error = reference.relative_error(y[~bad], truth)
        yield row(f"NaN and Inf: the other rows, {name}", m, weight.n, weight.k, error)


def strided(m: int, weight: RandomWeight, deepgemm: DeepGemm) -> Rows:
    """Take x from the middle of a wider matrix, with rows aligned to 16 bytes and not: the bits are the same."""
    wide = normal(m, 2 * weight.k + 16)
    for offset in (8, 3):
        x = wide[:, offset : offset + weight.k]
        y = weight.linear(x)
        same = torch.equal(y, weight.linear(x.contiguous()))
        yield check(f"strided x, {2 * offset} bytes in: bits of contiguous x", m, weight.n, weight.k, same)
        error = reference.relative_error(y, weight.truth(x))
        yield row(f"strided x, {2 * offset} bytes in", m, weight.n, weight.k, error)


def repeated(m: int, weight: RandomWeight, deepgemm: DeepGemm) -> Rows:
    """Run five times: the bits are the same."""
    x = normal(m, weight.k)
    codes, scale = per_token_group_quant(x)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "linear": lambda: weight.linear(x),
        "gemm": lambda: weight.multiply(codes, scale, packed=True),
    }
    for name, run in runs.items():
        first = run()
        same = all(torch.equal(first, run()) for _ in range(4))
        yield check(f"bitwise equal from run to run, {name}", m, weight.n, weight.k, same)


def quantisation(m: int, weight: RandomWeight, deepgemm: DeepGemm) -> Rows:
    """Compare codes and scales with the reference bit for bit, with zeros, large values, NaN and Inf among them."""
    for dtype in DTYPES:
        wide = torch.randn(m, weight.k + 3, device=DEVICE).to(dtype)
        wide[0] = 0
        wide[-1, 7], wide[m // 2, 10], wide[m // 3, 20] = 6e4, float("nan"), float("inf")
        for name, x in (("contiguous", wide[:, : weight.k].contiguous()), ("strided", wide[:, 3:])):
            found, expected = per_token_group_quant(x), reference.per_token_group_quant(x)
            same = _same_bits(found[0], expected[0]) and _same_bits(found[1], expected[1])
            case = f"quantisation bit for bit, {str(dtype).removeprefix('torch.')}, {name}"
            yield check(case, m, None, weight.k, same)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    dtype = torch.uint8 if left.dtype == torch.float8_e4m3fn else torch.int32
    return torch.equal(left.contiguous().view(dtype), right.contiguous().view(dtype))


def large_output(m: int, weight: RandomWeight, deepgemm: DeepGemm) -> Rows:
    """Write an output of more than 2^31 elements and compare all of it."""
    x = normal(m, weight.k)
    codes, scale = per_token_group_quant(x)
    peer = deepgemm.multiply(weight, codes, scale, demanded=True)
    peer_error = None if peer is None else _chunked_error(peer, weight, x)
    del peer
    for name in ("linear", "gemm"):
        y = weight.linear(x) if name == "linear" else weight.multiply(codes, scale, packed=True)
        yield row(
            f"output of {y.numel()} elements, {name}", m, weight.n, weight.k, _chunked_error(y, weight, x), peer_error
        )
        del y


def _chunked_error(y: torch.Tensor, weight: RandomWeight, x: torch.Tensor) -> float:
    wrong = total = 0.0
    for first in range(0, x.shape[0], CHUNK):
        truth = weight.truth(x[first : first + CHUNK])
        wrong += float((y[first : first + CHUNK].double() - truth).square().sum())
        total += float(truth.square().sum())
    return float((wrong / total) ** 0.5)


CASES: tuple[Case, ...] = (quantisation, non_finite, zero_rows, strided, repeated, outliers)


def main() -> None:
    """Run every case and write after each one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edge_cases", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="the smallest shapes only, to try the command on a CPU")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--deepgemm-seconds", type=float, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    deepgemm = DeepGemm(arguments.deepgemm_seconds)
    shapes, ms = (SHAPES[-1:], (1, 3, 17)) if arguments.small else (SHAPES, MS)
    work = [(case, m, shape) for shape in shapes for case in CASES for m in ms]
    if not arguments.small:
        work.append((large_output, LARGE[0], LARGE[1:]))
    weights: dict[tuple[int, ...], RandomWeight] = {}
    result: dict[str, Any] = {"rows": [], "failures": []}
    start, before = time.monotonic(), None
    for case, m, (n, k) in work:
        try:
            weight = weights.get((n, k)) or weights.setdefault((n, k), RandomWeight(n, k))
            result["rows"] += case(m, weight, deepgemm)
        except Exception as error:  # the other cases still count
            result["failures"].append(f"{case.__name__}, m={m}, {n} x {k}: {error!r}"[:400])
        if before != (case, n, k):
            print(f"{n:6d} x {k:5d} {case.__name__} after {time.monotonic() - start:.1f} s", flush=True)
            before = (case, n, k)
            write_json(arguments.out, {**result, "deepgemm": deepgemm.report()})
    write_json(arguments.out, {**result, "deepgemm": deepgemm.report()})


if __name__ == "__main__":
    main()
