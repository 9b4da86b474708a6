"""What the host code must agree on with the text of the device code: parameters of a kernel, constants, sizes."""

from __future__ import annotations

import re
from math import prod

from fp8_backend.kernels.compiler import CUDA_FOLDER

_SIZES = {"u8": 1, "u32": 4, "float": 4}


def parameter_kinds(file: str) -> tuple[str, ...]:
    """Return the kinds of a kernel's parameters, as `launcher.ParamLayout` names them."""
    signature = re.search(r'extern "C".*?\n\w+\((.*?)\) \{', (CUDA_FOLDER / file).read_text(), re.DOTALL)[1]
    kinds = []
    for parameter in signature.split(","):
        words = parameter.split()
        kind = {"float": "f32"}.get(words[0], words[0])
        kinds.append("map" if "TensorMap" in words else "u64" if "*" in parameter else kind)
    return tuple(kinds)


def constants(*files: str) -> dict[str, float]:
    """Return the constants of device code that are numbers, or sums and products of such as come before them."""
    found: dict[str, float] = {}

    def term(word: str) -> float:
        return found[word] if word in found else float(re.sub(r"(?<=[\d.])[fu]$", "", word))

    for file in files:
        for declared in re.findall(r"^constexpr \w+ ([^;]+);", (CUDA_FOLDER / file).read_text(), re.MULTILINE):
            for name, value in re.findall(r"(k\w+) = ([^,]+)", declared):
                try:
                    found[name] = sum(prod(map(term, product.split(" * "))) for product in value.split(" + "))
                except ValueError:  # depends on what a kernel is compiled for
                    continue
    return found


def struct_bytes(file: str, struct: str, known: dict[str, float]) -> int:
    """Return the size of a struct of device code, whose members are numbers and arrays of them."""
    body = re.search(rf"^struct {struct} {{\n(.*?)^}};", (CUDA_FOLDER / file).read_text(), re.MULTILINE | re.DOTALL)[1]
    size = 0
    for line in re.findall(r"^ {4}(\w[^(\n]*;)", re.sub(r" *//.*", "", body), re.MULTILINE):
        kind, members = re.fullmatch(r"(\w+) (.*);", line).groups()
        for member in members.split(", "):
            lengths = re.findall(r"\[(\w+)(?: / (\d+))?\]", member)
            size += _SIZES[kind] * prod(int(known.get(n) or n) // int(by or 1) for n, by in lengths)
    return size
