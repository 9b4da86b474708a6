"""Which linears are measured: models, regimes of m, and the order in which a layer calls its linears."""

from __future__ import annotations

from dataclasses import dataclass

from fp8_backend.errors import ArgumentError

Shape = tuple[int, int]  # (n, k)

# (n, k) of every FP8 linear of one rank, as vLLM builds them: merged qkv and gate_up; shared experts, no routed ones.
MODELS: dict[str, tuple[Shape, ...]] = {
    "deepseek-v3": (
        (2112, 7168),
        (24576, 1536),
        (32768, 512),
        (7168, 16384),
        (36864, 7168),
        (7168, 18432),
        (4096, 7168),
        (7168, 2048),
    ),
    "deepseek-v3-tp8": (
        (2112, 7168),
        (3072, 1536),
        (4096, 512),
        (7168, 2048),
        (4608, 7168),
        (7168, 2304),
        (512, 7168),
        (7168, 256),
    ),
    "qwen3-8b": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    "qwen3-32b": ((10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)),
}
# Eight linears in the order of the layer; each takes the first k columns of what the one before it wrote.
_QWEN3_8B = MODELS["qwen3-8b"]
_DEEPSEEK_TP8 = ((2112, 7168), (3072, 1536), (7168, 2048), (512, 7168), (7168, 256))
CHAINS: dict[str, tuple[Shape, ...]] = {
    "qwen3-8b": _QWEN3_8B * 2,
    "deepseek-v3-tp8": (_DEEPSEEK_TP8 * 2)[:8],
}
CHAIN_MS = (1, 16)


@dataclass(frozen=True)
class Regime:
    """A range of m and what is to be reached in it.

    geomean: of best FP8 peer / ours. cell: of best peer, BF16 too, / ours in every cell; 3 % below 1 is noise.
    """

    name: str
    ms: tuple[int, ...]
    geomean: float
    cell: float = 0.97


REGIMES = (
    Regime("decode", (1, 2, 4, 8, 16, 32, 64), 1.7),
    Regime("middle", (128, 256, 512, 1024), 1.2),
    Regime("prefill", (2048, 4096, 8192, 16384), 1.06),
)
ALL_MS = tuple(m for regime in REGIMES for m in regime.ms)
DECODE_M = REGIMES[0].ms[-1]


def regime_of(m: int) -> Regime:
    """Return the regime m belongs to, by its upper end."""
    return next((regime for regime in REGIMES if m <= regime.ms[-1]), REGIMES[-1])


def parse_shapes(model: str | None, shapes: str | None) -> tuple[Shape, ...]:
    """Return the (n, k) asked for, each once; every model's by default.

    Args:
        model: names of MODELS, comma-separated.
        shapes: such as 4096x7168,512x7168.

    Raises:
        ArgumentError: an unknown model, or a shape that cannot be read.
    """
    found: list[Shape] = []
    for name in (model or ("" if shapes else ",".join(MODELS))).split(","):
        if name and name not in MODELS:
            raise ArgumentError(f"--model {name}: unknown; models: {', '.join(MODELS)}; or give --shapes NxK,...")
        found += MODELS.get(name, ())
    for text in shapes.split(",") if shapes else ():
        n, separator, k = text.partition("x")
        if not (separator and n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise ArgumentError(f"--shapes {text}: expected NxK with n and k above 0, such as 4096x7168")
        found.append((int(n), int(k)))
    return tuple(dict.fromkeys(found))


def parse_ms(text: str | None, default: tuple[int, ...] = ALL_MS, option: str = "--m") -> tuple[int, ...]:
    """Return the m asked for, each once, ascending; those of every regime by default.

    Raises:
        ArgumentError: a number that cannot be read or is not above 0.
    """
    if text is None:
        return default
    for number in text.split(","):
        if not number.isdecimal() or not int(number):
            raise ArgumentError(f"{option} {number}: expected numbers above 0, comma-separated, such as 1,16,4096")
    return tuple(sorted({int(number) for number in text.split(",")}))
