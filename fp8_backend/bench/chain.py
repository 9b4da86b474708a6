"""Eight dependent linears in one CUDA graph, in the order of a layer, against their chained stream floors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fp8_backend.bench.operands import RandomLinear
from fp8_backend.bench.shapes import CHAIN_MS, CHAINS, Shape
from fp8_backend.bench.stream import stream_us
from fp8_backend.kernels import reference
from fp8_backend.measure.accuracy import LIMIT_ALONE
from fp8_backend.measure.timing import capture, copies_for, interleaved_us

LIMIT = 1.25  # of the sum of the chained floors


def run() -> Iterator[dict[str, Any]]:
    """Yield one row for each chain and m."""
    for name, shapes in CHAINS.items():
        size = sum(n * k for n, k in shapes)
        repeats = copies_for(size)
        # Each place of the chain has weights of its own, as layers have: nothing comes from L2.
        weights = {
            shape: RandomLinear(*shape, copies=repeats * shapes.count(shape), bf16=False, plain=False)
            for shape in dict.fromkeys(shapes)
        }
        floors = {shape: _floor(*shape) for shape in weights}
        for m in CHAIN_MS:
            yield {"chain": name, "m": m, "linears": len(shapes), **measure(shapes, weights, floors, repeats, m)}
        del weights
        torch.cuda.empty_cache()


def _floor(n: int, k: int) -> float:
    """Return the chained floor of one weight in the layout of ours."""
    copies = [torch.randint(0, 255, (n * k,), dtype=torch.uint8, device="cuda") for _ in range(copies_for(n * k))]
    return stream_us(copies)[1]


def measure(
    shapes: tuple[Shape, ...], weights: dict[Shape, RandomLinear], floors: dict[Shape, float], repeats: int, m: int
) -> dict[str, Any]:
    """Return the time of one chain, its floor, and the largest error of a link for what that link was given."""
    x = torch.randn(m, shapes[0][1], device="cuda", dtype=torch.bfloat16)
    used = dict.fromkeys(weights, 0)
    links = []
    for shape in shapes * repeats:
        links.append((weights[shape], used[shape]))
        used[shape] += 1

    def call() -> list[torch.Tensor]:
        outputs = [x]
        for weight, copy in links:
            outputs.append(weight.linear(outputs[-1][:, : weight.k], copy))
        return outputs

    captured = capture([call])
    us = interleaved_us({"chain": captured})["chain"] / repeats
    outputs = captured.outputs[0]
    for out in outputs[1:]:
        out.fill_(float("nan"))
    captured.graph.replay()
    torch.cuda.synchronize()
    error = max(
        reference.relative_error(outputs[index + 1], weight.truth(outputs[index][:, : weight.k]))
        for index, (weight, _) in enumerate(links[: len(shapes)])
    )
    floor = sum(floors[shape] for shape in shapes)
    finite = all(bool(out.isfinite().all()) for out in outputs)
    return {
        "us": round(us, 3),
        "floor_us": round(floor, 3),
        "ratio": round(us / floor, 3),
        "rel_err": error if error < 1e300 else None,
        "verified": finite and error <= LIMIT_ALONE,
    }


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    verdict = "holds" if row["ratio"] <= LIMIT else "MISSED"
    good = "verified" if row["verified"] else "WRONG"
    return (
        f"chain {row['chain']} m={row['m']}: {row['linears']} dependent linears {row['us']:.2f} us, chained floors "
        f"{row['floor_us']:.2f} us, {row['ratio']:.2f}x (at most {LIMIT}: {verdict}), {good}"
    )
