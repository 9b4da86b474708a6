"""Ranks of data parallel whose experts are spread over both, behind `vllm serve`; vLLM gathers no rows so on a CPU."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
MAX_KL = 0.003
RANKS = ["--data-parallel-size", "2", "--enable-expert-parallel"]


def answers(checkpoint: Path, log: Path, *arguments: str) -> list[torch.Tensor]:
    """Return what a server answers to each of two prompts, asked four times at once, so that both ranks have some."""
    from benchmarks.serve import ENVIRONMENT, ON_GPU, SERVE, scored
    from demo.server import Server

    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    variables = {**ENVIRONMENT, "VLLM_CACHE_ROOT": str(log.with_suffix(".cache"))}
    with Server(checkpoint, log, ["--quantization", "deepgemm_fp8", *arguments, *SERVE, *ON_GPU], variables) as server:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda _: scored(server, vocab), range(4)))


@pytest.mark.parametrize("architecture", ["deepseek_v3", "qwen3_moe"])
def test_ranks_that_share_experts_answer_as_one_does(architecture: Any, tmp_path: Path) -> None:
    from benchmarks.serve import VOCAB, mean_kl
    from demo.architectures import SIZES
    from demo.checkpoint import write_checkpoint

    checkpoint, log = tmp_path / architecture, tmp_path / "two.log"
    size = SIZES[architecture, "demo"]
    write_checkpoint(checkpoint, architecture, replace(size, vocab=min(size.vocab, VOCAB)))
    torch.cuda.empty_cache()  # servers ask how much is free
    expected = answers(checkpoint, tmp_path / "one.log")[0]
    for found in answers(checkpoint, log, *RANKS):
        assert mean_kl(expected, found) <= MAX_KL
    said = log.read_text(errors="replace")
    assert said.count("MoE layers: fp8_backend sm90; fell back: none") == 2
    assert "DP1" in said
