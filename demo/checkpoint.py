"""Generate FP8 checkpoints of real architectures with random weights, and their bf16 twins.

    python -m demo.checkpoint OUT --architecture deepseek_v3 --size demo --bf16 TWIN

The weights are random but calm: no layer dominates the residual stream, so rounding an activation moves the logits a
little and not over a routing cliff. Scales differ from block to block, so that a transposed or misplaced one shows.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterable
from math import log
from pathlib import Path
from typing import get_args

import torch

from demo.architectures import EMBEDDING, SIZES, Architecture, Size, TensorSpec, model_config, tensor_specs
from demo.tokenizer import write_tokenizer
from demo.twin import dequantize_checkpoint, write_shards
from fp8_backend.kernels.reference import BLOCK, FP8_MAX, MIN_AMAX, ceil_div

# Standard deviation of a linear layer's output for inputs of unit variance. Larger values turn a rounding into another
# expert choice often enough that even two correct servers disagree.
GAIN = 0.6
# Each token has one successor whose logit is raised by this times sqrt(ln(vocab)): above the largest of the others in
# most places but not in all, so that greedy text rarely hangs on a rounding, does not go in circles, and a wrong layer
# still shows.
PREFERENCE = 1.8


def quantize_weight(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight to e4m3 with one scale a 128x128 block, scale = amax / 448 rounded to `scale_dtype`.

    Args:
        weight: [n, k], any float dtype.
        scale_dtype: float32 or bfloat16.

    Returns:
        codes: [n, k] float8_e4m3fn. scale: [ceil(n / 128), ceil(k / 128)]; weight is about codes * scale.
    """
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.view(ceil_div(n, BLOCK), BLOCK, ceil_div(k, BLOCK), BLOCK)
    scale = (blocks.abs().amax(dim=(1, 3)).clamp_min(MIN_AMAX) / FP8_MAX).to(scale_dtype)
    codes = (blocks / scale.float()[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view(padded.shape)[:n, :k]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def generate(spec: TensorSpec, scale_dtype: torch.dtype, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors stored for `spec`, on the CPU; the same for the same seed, name and kind of device."""
    # One 32-bit number: the CPU generator ignores the upper half of a longer seed.
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {spec.name}".encode()))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    match spec.kind:
        case "fp8":
            n, k = spec.shape
            grid = normal(ceil_div(n, BLOCK), ceil_div(k, BLOCK)).mul(0.3).exp()
            wide = grid.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
            codes, scale = quantize_weight(normal(n, k) * wide * (GAIN / k**0.5), scale_dtype)
            return {spec.name: codes.cpu(), f"{spec.name}_scale_inv": scale.cpu()}
        case "embedding":
            tensor = normal(*spec.shape)
        case "router":
            tensor = normal(*spec.shape) / spec.shape[1] ** 0.5
        case "head":
            vocab, hidden = spec.shape
            embedding = generate(TensorSpec(EMBEDDING, spec.shape, "embedding"), scale_dtype, seed, device)[EMBEDDING]
            order = torch.randperm(vocab, generator=generator, device=device)  # one cycle through the vocabulary
            tensor = normal(vocab, hidden) / hidden**0.5
            tensor[order.roll(-1)] += embedding.to(device)[order] * (PREFERENCE * log(vocab) ** 0.5 / hidden)
        case "norm":
            tensor = 1 + 0.1 * normal(*spec.shape)
        case "router_bias":
            return {spec.name: (0.01 * normal(*spec.shape)).cpu()}
    return {spec.name: tensor.to(torch.bfloat16).cpu()}


def _assign_shards(specs: Iterable[TensorSpec], shards: int) -> list[list[TensorSpec]]:
    """Cut the specs, in order, into `shards` runs of about equal bytes."""
    specs = list(specs)
    total = sum(spec.stored_bytes for spec in specs)
    result: list[list[TensorSpec]] = [[] for _ in range(shards)]
    before = 0
    for spec in specs:
        result[min(shards - 1, before * shards // total)].append(spec)
        before += spec.stored_bytes
    return result


def _shard_names(shards: int) -> list[str]:
    if shards == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]


def write_checkpoint(
    out: Path, architecture: Architecture, size: Size, seed: int = 0, device: torch.device | None = None
) -> None:
    """Write a complete FP8 checkpoint: config, tokenizer, shards and their index.

    Memory stays near two shards. `size.shards == 1` writes a single model.safetensors without an index.

    Args:
        out: folder to create, or an empty one.
        architecture: the model's `model_type`.
        size: widths and counts; `SIZES` holds the ready ones.
        seed: of every random number.
        device: where weights are drawn and quantised; a GPU by default where there is one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(architecture, size)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_tokenizer(out, size.vocab, config["max_position_embeddings"])
    assigned = _assign_shards(tensor_specs(architecture, size), size.shards)

    scale_dtype = (
        torch.float32 if architecture == "deepseek_v3" else torch.bfloat16
    )  # as the published checkpoints have it

    def tensors(specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
        return {name: tensor for spec in specs for name, tensor in generate(spec, scale_dtype, seed, device).items()}

    write_shards(out, ((name, tensors(specs)) for name, specs in zip(_shard_names(size.shards), assigned, strict=True)))


def main() -> None:
    """Write a checkpoint, and its bf16 twin where asked, from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.checkpoint", description="Generate an FP8 checkpoint of random weights."
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--architecture", choices=get_args(Architecture), default="deepseek_v3")
    parser.add_argument("--size", choices=["demo", "large"], default="demo", help="large: at least 1 GB of FP8 weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", type=Path, metavar="TWIN", help="also write the dequantised bf16 twin to this folder")
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty; name a new folder or delete it")
    write_checkpoint(
        arguments.out, arguments.architecture, SIZES[arguments.architecture, arguments.size], arguments.seed
    )
    if arguments.bf16:
        dequantize_checkpoint(arguments.out, arguments.bf16)


if __name__ == "__main__":
    main()
