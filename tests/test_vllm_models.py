"""Real vLLM engines on generated checkpoints, held against the same weights dequantised to bf16."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8_backend.weights.files import INDEX

pytestmark = pytest.mark.vllm

WORKER = Path(__file__).with_name("vllm_worker.py")
MAX_KL = 0.003
FLAG = {"quantization": "deepgemm_fp8"}
GENERATOR = torch.Generator().manual_seed(0)
# Ids below 5 are special tokens. 4 x 48 tokens give 188 positions whose whole distribution is compared.
PROMPTS = torch.randint(5, 1000, (4, 48), generator=GENERATOR).tolist()
LINES = {
    "deepseek_v3": "18 of 18 linears: fp8_backend reference; 2 of 2 MoE layers: fp8_backend reference; fell back: none",
    "qwen3": "12 of 12 linears: fp8_backend reference; fell back: none",
    "qwen3_moe": "6 of 6 linears: fp8_backend reference; 3 of 3 MoE layers: fp8_backend reference; fell back: none",
}
# What `fp8-backend quantize` makes of a bf16 twin. Experts of one layer are kept, so that a mixed model is served too.
QUANTIZED = {
    "quantized": [],
    "compressed-tensors": ["--format", "compressed-tensors", "--scales", "e8m0", "--keep", r"layers\.1\.mlp\.experts"],
}
# Widths that merging, and splitting over 2 ranks, cut within 128x128 blocks: q 384 / k 128 / v 128 and gate, up 576.
UNEVEN = {"head_dim": 64, "heads": 6, "kv_heads": 2, "intermediate": 576}
MISSING = "model.layers.2.mlp.experts.3.down_proj.weight"  # 512 x 256 codes
ON_CPU = not torch.cuda.is_available()


class Answer(NamedTuple):
    logprobs: torch.Tensor  # [positions, vocabulary] float64
    tokens: list[list[int]]
    log: str
    events: list[torch.Tensor] = []  # logprobs again, after each
    refusal: str | None = None
    steps: list[torch.Tensor] = []  # of each prompt [16, vocabulary], where its tokens come from


Engine = Callable[..., Answer]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Return a function that runs an engine on a generated checkpoint, once for each set of arguments."""
    from demo.architectures import SIZES
    from demo.checkpoint import dequantize_checkpoint, write_checkpoint
    from fp8_backend.cli import main

    root = tmp_path_factory.mktemp("engines")
    answers: dict[str, Answer] = {}

    def checkpoint(architecture: Any, kind: str) -> Path:
        folder = root / f"{architecture}-{kind}"
        if not folder.exists():
            if kind in QUANTIZED:
                source = str(checkpoint(architecture, "bf16"))
                assert main(["quantize", source, str(folder), "--workers", "1", *QUANTIZED[kind]]) == 0
            elif kind.endswith("bf16"):
                dequantize_checkpoint(checkpoint(architecture, kind.removesuffix("bf16") or "fp8"), folder)
            else:
                changes = {"uneven": UNEVEN, "cut": {"moe_intermediate": 384}}.get(kind, {})
                write_checkpoint(folder, architecture, replace(SIZES[architecture, "demo"], **changes))
            if kind == "part":
                drop_tensor(folder, MISSING)
            if kind == "multi-token":
                add_multi_token_head(folder)
        return folder

    def run(
        architecture: str,
        kind: str = "fp8",
        events: Sequence[str] = (),
        refused: str | None = None,
        pieces: bool = False,
        **arguments: Any,
    ) -> Answer:
        """Kind "part": what "fp8" is, but for one expert's codes. pieces: compiled as on GPUs, with an empty cache."""
        flag = {} if kind.endswith("bf16") else FLAG
        arguments = {"model": str(checkpoint(architecture, kind)), **flag, **arguments}
        folder = str(checkpoint(architecture, refused)) if refused else None
        key = json.dumps([arguments, events, folder, pieces], sort_keys=True)
        if key not in answers:
            answers[key] = _run(root, arguments, events, folder, pieces)
        return answers[key]

    return run


def drop_tensor(folder: Path, name: str) -> None:
    """Take a tensor out of a checkpoint and its index."""
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    (folder / INDEX).write_text(json.dumps(index))


def add_multi_token_head(folder: Path) -> None:
    """Add a layer beyond num_hidden_layers, as DeepSeek-V3 has one; store all tensors as one file without an index."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink()
    config = json.loads((folder / "config.json").read_text())
    last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
    stem = f"model.layers.{last + 1}."
    for name in [name for name in tensors if name.startswith(f"model.layers.{last}.")]:
        tensors[name.replace(f"layers.{last}.", f"layers.{last + 1}.")] = tensors[name].clone()
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{stem}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors[f"{stem}eh_proj.weight"] = torch.eye(hidden).repeat(1, 2).bfloat16() / 2
    tensors[f"{stem}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{stem}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def _run(folder: Path, arguments: dict[str, Any], events: Sequence[str], refused: str | None, pieces: bool) -> Answer:
    request, answer = folder / "request.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    asked = {"engine": arguments, "prompts": PROMPTS, "events": events, "refused": refused, "pieces": pieces}
    request.write_text(json.dumps(asked))
    path = os.pathsep.join(filter(None, [str(WORKER.parent.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if arguments.get("tensor_parallel_size") == 2:
        # Two ranks on one NUMA node: vLLM wants to be told their cores.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    if pieces:
        environment["VLLM_CACHE_ROOT"] = str(folder / "compiled")
    if events or refused or pieces:
        # In one process all prompts are there before the first step, so batches, and rounding, are alike each time.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run(
        [sys.executable, str(WORKER), str(request), str(answer)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    said = json.loads(answer.read_text())
    events = [_rows(event) for event in said["events"]]
    steps = [torch.tensor(rows, dtype=torch.float64) for rows in said["steps"]]
    return Answer(_rows(said), said["tokens"], log, events, said.get("refusal"), steps)


def _rows(said: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([row for prompt in said["logprobs"] for row in prompt], dtype=torch.float64)


def mean_kl(expected: Answer, got: Answer) -> float:
    assert expected.logprobs.shape == got.logprobs.shape
    return float((expected.logprobs.exp() * (expected.logprobs - got.logprobs)).sum(dim=1).mean())


@pytest.mark.parametrize("architecture", LINES)
def test_close_to_bf16_twin(engine: Engine, architecture: str) -> None:
    ours, twin = engine(architecture), engine(architecture, "bf16")
    assert ours.logprobs.shape == (188, 1024)
    torch.testing.assert_close(twin.logprobs.exp().sum(dim=1), torch.ones(188, dtype=torch.float64), rtol=0, atol=1e-3)
    assert mean_kl(twin, ours) <= MAX_KL
    # 0 would mean that both engines multiplied in bf16.
    assert mean_kl(twin, ours) > 1e-6


@pytest.mark.parametrize(("kind", "moe_layers"), [("quantized", 3), ("compressed-tensors", 2)])
def test_quantized_checkpoints_are_served(engine: Engine, kind: str, moe_layers: int) -> None:
    ours = engine("qwen3_moe", kind)
    assert 1e-6 < mean_kl(engine("qwen3_moe", "bf16"), ours) <= MAX_KL
    if ON_CPU:
        assert f"6 of 6 linears: fp8_backend reference; {moe_layers} of {moe_layers} MoE layers: " in ours.log


def test_a_multi_token_head_is_served_and_changes_no_answer(engine: Engine) -> None:
    alone = engine("deepseek_v3")
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    both = engine("deepseek_v3", "multi-token", speculative_config=speculative)
    assert mean_kl(alone, both) <= MAX_KL
    # Batches differ and with them roundings: one of the texts may hang on a near tie.
    assert sum(map(list.__eq__, both.tokens, alone.tokens)) >= len(PROMPTS) - 1
    if ON_CPU:
        assert "24 of 24 linears: fp8_backend reference; 3 of 3 MoE layers: fp8_backend reference" in both.log


@pytest.mark.parametrize("architecture", LINES)
@pytest.mark.skipif(not ON_CPU, reason="counts the layers that the CPU's reference kernels serve")
def test_summary_counts_every_fp8_layer(engine: Engine, architecture: str) -> None:
    lines = [line for line in engine(architecture).log.splitlines() if " linears: fp8_backend " in line]
    assert len(lines) == 1
    assert lines[0].endswith(LINES[architecture])
    assert ": fp8_backend " not in engine(architecture, "bf16").log


@pytest.mark.skipif(not ON_CPU, reason="guards against a fault of torch.compile's C++ backend")
def test_compiled_agrees_with_eager(engine: Engine) -> None:
    compiled = engine("deepseek_v3", enforce_eager=False)
    assert compiled.logprobs.isfinite().all()
    assert mean_kl(engine("deepseek_v3"), compiled) <= MAX_KL


def test_linears_that_are_joined_to_what_comes_before_them(engine: Engine) -> None:
    """vLLM's own compilation: a piece before the first attention, between two of them, and behind the last one."""
    joined = engine("qwen3", enforce_eager=False, pieces=True)
    assert mean_kl(engine("qwen3"), joined) <= MAX_KL
    line = r"of (\d) linears in a compiled piece (\d) are joined to RMSNorm and (\d) to SiLU.*? by themselves(;.*)?$"
    heads = "; queries and keys are normalised and rotated in one kernel, which writes the cache, too"
    said = [("1", "1", "0", heads), ("4", "2", "1", heads), ("3", "1", "1", "")]
    assert re.findall(line, joined.log, re.MULTILINE) == said


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("deepseek_v3", {}),
        ("deepseek_v3", {"enable_expert_parallel": True}),
        ("qwen3_moe", {"enable_expert_parallel": True}),
        ("qwen3_moe", {"kind": "cut"}),  # 192 of 384 rows of each expert on a rank: the middle block is both ranks'
    ],
)
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_agree_with_one(engine: Engine, architecture: str, arguments: dict[str, Any]) -> None:
    two = engine(architecture, tensor_parallel_size=2, **arguments)
    assert mean_kl(engine(architecture, arguments.get("kind", "fp8")), two) <= MAX_KL
    assert two.log.count(" linears: fp8_backend ") == 1
    # The first process verifies the files; ranks do not repeat it.
    assert two.log.count("checkpoint is complete") == 1


def test_parts_that_cut_blocks(engine: Engine) -> None:
    one = engine("qwen3", "uneven")
    assert 1e-6 < mean_kl(engine("qwen3", "unevenbf16"), one) <= MAX_KL
    assert "12 of 12 linears: fp8_backend" in one.log


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_whose_parts_cut_blocks(engine: Engine) -> None:
    two = engine("qwen3", "uneven", tensor_parallel_size=2, enforce_eager=False)
    assert mean_kl(engine("qwen3", "uneven"), two) <= MAX_KL


@pytest.mark.parametrize(("architecture", "kind"), [("qwen3", "uneven"), ("deepseek_v3", "fp8")])
def test_reloaded_weights_give_the_same_answers(engine: Engine, architecture: str, kind: str) -> None:
    # On a CPU with AMX tiles vLLM's own choice gives kv_b_proj's weight away, and no reload finds it again.
    arguments = {"attention_backend": "CPU_MLA"} if ON_CPU and architecture == "deepseek_v3" else {}
    answer = engine(architecture, kind, events=["reload", "reload"], **arguments)
    assert len(answer.events) == 2
    for again in answer.events:
        assert torch.equal(again, answer.logprobs)


def test_a_reload_of_some_experts_is_refused_and_changes_nothing(engine: Engine) -> None:
    answer = engine("qwen3_moe", refused="part")
    assert MISSING in answer.refusal
    assert "nothing was reloaded" in answer.refusal
    assert torch.equal(answer.events[-1], answer.logprobs)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_decode_steps_attend_as_flash_attention_does(
    engine: Engine, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "attention of decode steps: fp8_backend sm90"
    ours = engine(architecture, enforce_eager=False, max_num_seqs=8)
    monkeypatch.setenv("FP8_BACKEND_ATTENTION", "0")
    theirs = engine(architecture, enforce_eager=False, max_num_seqs=4)
    assert line in ours.log and line not in theirs.log
    kl = []
    for *tokens, own, other in zip(ours.tokens, theirs.tokens, ours.steps, theirs.steps, strict=True):
        # A near tie may end otherwise, and another token has other successors.
        same = next((index for index, pair in enumerate(zip(*tokens, strict=True)) if pair[0] != pair[1]), 15) + 1
        kl.append((own.exp() * (own - other)).sum(1)[:same])
    assert 0 < float(torch.cat(kl).mean()) <= MAX_KL and sum(map(len, kl)) >= 32


@pytest.mark.gpu
def test_sleep_gives_the_same_answers(engine: Engine) -> None:
    events = ["sleep 1", "sleep 2", "reload"]
    answer = engine("qwen3", "uneven", events=events, enable_sleep_mode=True, enforce_eager=False, max_num_seqs=4)
    for event, again in zip(events, answer.events, strict=True):
        assert torch.equal(again, answer.logprobs), event
