"""Write benchmarks/results/h200/serve.json: our method and stock vLLM behind `vllm serve`, compared.

    python -m benchmarks.serve

Each arm is one server, with torch.compile and CUDA graphs on a GPU, that is asked everything over HTTP: greedy texts
and the log-probability of every token at every position. An arm that fails is named and the others go on; the result
is written after each one. Exits with status 1 where an arm failed or a mean KL exceeds 0.003.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, results
from demo.architectures import SIZES, Architecture
from demo.checkpoint import write_checkpoint
from demo.server import Completion, DemoError, Server
from demo.twin import dequantize_checkpoint
from fp8_backend.ab.logs import SUMMARY, selection_lines
from fp8_backend.measure.child import stop_children_on_signals
from fp8_backend.measure.environment import environment, write_json
from fp8_backend.weights.checkpoint import verify_checkpoint

MAX_KL = 0.003
# Every log-probability crosses HTTP as JSON: this many words, not 16384, keep it to seconds, and cut no FP8 weight.
VOCAB = 4096
GENERATOR = torch.Generator().manual_seed(0)
# Token ids of two prompts, special ones left out: one for the linear's kernel of at most 64 tokens, one for the other.
SCORED = [torch.randint(5, 1000, (length,), generator=GENERATOR).tolist() for length in (48, 144)]
PROMPTS = ("once upon a time there was a young dog", "snow on the mountain and a red moon", "one two three four five")
MAX_TOKENS = 64
SERVE = ["--max-model-len", "512", "--max-num-seqs", "4", "--max-logprobs", "-1", "--no-enable-prefix-caching"]
ON_GPU = [
    "--gpu-memory-utilization",
    "0.3",
    "--kv-cache-memory-bytes",  # given, not profiled: other processes of this evidence may use the GPU meanwhile
    str(2 << 30),
    "--compilation-config",
    json.dumps({"cudagraph_capture_sizes": [1, 4, 64]}),
]
ON_CPU = ["--enforce-eager"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # In every arm. Stock vLLM rounds weight scales to powers of two by default: other weights than the checkpoint's.
    "VLLM_USE_DEEP_GEMM_E8M0": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # in GiB
}
ARMS = {"ours": ["--quantization", "deepgemm_fp8"], "stock": [], "twin": []}
START_LIMIT_S = 240
REQUEST_LIMIT_S = 90


@dataclass
class Arm:
    """What one server of one model said."""

    model: str
    arm: str
    serve: str
    start_up_s: float
    tokens_per_second: float
    summary: str | None
    selection: list[str]
    completions: list[Completion]
    logprobs: torch.Tensor  # [positions, vocab] float64

    def record(self) -> dict[str, Any]:
        """Return what goes into the result: all but the log-probabilities."""
        found = {key: value for key, value in vars(self).items() if key not in ("logprobs", "completions")}
        texts = [
            {"prompt": prompt, "text": completion.text}
            for prompt, completion in zip(PROMPTS, self.completions, strict=True)
        ]
        return {**found, "completions": texts, "positions": len(self.logprobs)}


def scored(server: Server, vocab: int) -> torch.Tensor:
    """Return the server's log-probabilities of every token after every given one, [positions, vocab] float64."""
    rows = []
    for prompt in SCORED:
        body = {"model": str(server.model), "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": -1}
        choice = server.post("/v1/completions", body, REQUEST_LIMIT_S)["choices"][0]
        # Nothing predicts the first token.
        for given in choice["prompt_logprobs"][1:]:
            rows.append([given[str(token)]["logprob"] for token in range(vocab)])
    return torch.tensor(rows, dtype=torch.float64)


def run_arm(model: str, arm: str, checkpoint: Path, folder: Path, logs: Path, limit_s: float) -> Arm:
    """Serve a checkpoint and ask everything.

    Raises:
        DemoError: the server fails, refuses or takes too long.
    """
    arguments = [*ARMS[arm], *SERVE, *(ON_GPU if torch.cuda.is_available() else ON_CPU)]
    # Nothing compiled for one arm serves another.
    variables = {**ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder / f"{model}-{arm}-cache")}
    logs.mkdir(parents=True, exist_ok=True)
    with Server(checkpoint, logs / f"serve-{model}-{arm}.log", arguments, variables, limit_s) as server:
        server.complete(PROMPTS[0], 8)  # what happens once is not speed
        begin = time.monotonic()
        completions = [server.complete(prompt, MAX_TOKENS) for prompt in PROMPTS]
        seconds = time.monotonic() - begin
        logprobs = scored(server, json.loads((checkpoint / "config.json").read_text())["vocab_size"])
        log = server.log.read_text(errors="replace")
    summary = SUMMARY.search(log)
    return Arm(
        model=model,
        arm=arm,
        serve=f"vllm serve {checkpoint.name} {' '.join(arguments)}",
        start_up_s=round(server.started_s, 1),
        tokens_per_second=round(len(PROMPTS) * MAX_TOKENS / seconds, 1),
        summary=summary[0] if summary else None,
        selection=selection_lines(log),
        completions=completions,
        logprobs=logprobs,
    )


def mean_kl(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Return the mean over positions of KL(expected || got), in nats.

    Args:
        expected: log-probabilities [positions, vocab] float64.
        got: likewise.
    """
    assert expected.shape == got.shape
    return float((expected.exp() * (expected - got)).sum(dim=1).mean())


def compare(ours: Arm, theirs: Arm, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the row on two arms of one model."""
    same, gaps = [], []
    for mine, other in zip(ours.completions, theirs.completions, strict=True):
        pairs = enumerate(zip(mine.tokens, other.tokens, strict=True))
        same.append(next((position for position, (left, right) in pairs if left != right), len(mine.tokens)))
        if same[-1] < len(mine.tokens):
            alternatives, chosen = other.alternatives[same[-1]], other.tokens[same[-1]]
            gaps.append(round(alternatives[chosen] - alternatives.get(mine.tokens[same[-1]], float("-inf")), 4))
    return {
        "model": ours.model,
        "against": theirs.arm,
        "mean_kl": mean_kl(theirs.logprobs, ours.logprobs),
        "positions": len(ours.logprobs),
        "vocab": ours.logprobs.shape[1],
        "top_1_agreement": float((ours.logprobs.argmax(1) == theirs.logprobs.argmax(1)).double().mean()),
        "greedy_equal": all(count == MAX_TOKENS for count in same),
        "greedy_equal_tokens": same,
        "greedy_tokens": MAX_TOKENS,
        # By how much the other arm prefers its own token where the texts part: small for a near tie.
        "greedy_gaps": gaps,
        "ours": {"start_up_s": ours.start_up_s, "tokens_per_second": ours.tokens_per_second, "summary": ours.summary},
        "theirs": {"start_up_s": theirs.start_up_s, "tokens_per_second": theirs.tokens_per_second},
        "checkpoint": checkpoint,
    }


def make_checkpoint(model: Architecture, size_name: str, folder: Path, twin: bool) -> tuple[dict[str, Path], Any]:
    """Write a model's checkpoint; return where each arm finds its own, and what was verified about it."""
    size = SIZES[model, size_name]
    fp8, bf16 = folder / f"{model}-fp8", folder / f"{model}-bf16"
    write_checkpoint(fp8, model, replace(size, vocab=min(size.vocab, VOCAB)))
    if twin:
        dequantize_checkpoint(fp8, bf16)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"ours": fp8, "stock": fp8, "twin": bf16}, asdict(verify_checkpoint(fp8))


def problems_of(result: dict[str, Any], models: Iterable[str], against: Iterable[str]) -> list[str]:
    """Return one line for everything that is missing or wrong."""
    found = list(result["env"]["failures"])
    rows = {(row["model"], row["against"]): row for row in result["rows"]}
    for pair in ((model, other) for model in models for other in against):
        if pair not in rows:
            found.append(f"{pair[0]} against {pair[1]}: not compared")
        elif not rows[pair]["mean_kl"] <= MAX_KL:
            found.append(f"{pair[0]} against {pair[1]}: mean KL {rows[pair]['mean_kl']:.5f} exceeds {MAX_KL}")
    for arm in result["arms"]:
        if arm["arm"] == "ours" and arm["summary"] is None:
            found.append(f"{arm['model']}: the log has no line on fp8_backend's layers")
    return found


def run_model(
    model: Architecture, against: list[str], options: argparse.Namespace, end: float, result: dict[str, Any]
) -> None:
    """Run every arm of one model, the last one started before `end`; enter each into `result` and write that."""
    done: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory(prefix="fp8-serve-") as name:
        start = time.monotonic()
        for arm in ("checkpoint", "ours", *against):
            try:
                if (left := end - time.monotonic()) < 30:
                    raise DemoError(f"{left:.0f} s are left of --deadline {options.deadline:.0f}")
                if arm == "checkpoint":
                    checkpoints, verified = make_checkpoint(model, options.size, Path(name), "twin" in against)
                    print(f"{model}: {verified['fp8_bytes'] / 1e9:.2f} GB of FP8 weights", flush=True)
                    continue
                found = run_arm(model, arm, checkpoints[arm], Path(name), options.logs, min(START_LIMIT_S, left))
            except Exception as error:  # the other arms and models still count
                reason = str(error) if isinstance(error, DemoError) else repr(error)
                result["env"]["failures"].append(f"{model}, {arm}: {reason[-3000:]}")
                print(f"{model}, {arm} FAILED: {reason[-3000:]}", flush=True)
                if arm == "checkpoint":
                    return
                continue
            finally:
                write_json(options.out, result)
            done[arm] = found
            result["arms"].append(found.record())
            if arm != "ours" and "ours" in done:
                result["rows"].append(compare(done["ours"], found, verified))
            write_json(options.out, result)
            spent = time.monotonic() - start
            print(
                f"{model}, {arm}: up after {found.start_up_s} s, {found.tokens_per_second} tokens/s, "
                f"{spent:.0f} s in all; {found.summary}",
                flush=True,
            )


def main() -> None:
    """Run every arm of every model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--out", type=Path, default=results() / "serve.json")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "serve-logs", help="of the servers")
    parser.add_argument("--commit", help="where the tree is no repository")
    parser.add_argument("--models", default="deepseek_v3,qwen3,qwen3_moe")
    parser.add_argument("--against", default="stock", help="stock, twin (the dequantised bf16 checkpoint), or both")
    parser.add_argument("--size", choices=["demo", "large"], default="large")
    parser.add_argument("--deadline", type=float, default=570, help="seconds after which no server is waited for")
    arguments = parser.parse_args()
    stop_children_on_signals()
    begin = time.monotonic()
    models, against = arguments.models.split(","), arguments.against.split(",")
    env = {**environment(arguments.commit), "environment_variables": ENVIRONMENT, "failures": []}
    result: dict[str, Any] = {"env": env, "arms": [], "rows": []}
    for model in models:
        run_model(model, against, arguments, begin + arguments.deadline, result)
    for row in result["rows"]:
        print({key: row[key] for key in ("model", "against", "mean_kl", "greedy_equal_tokens", "top_1_agreement")})
    if problems := problems_of(result, models, against):
        print("\n".join(problem[:1000] for problem in problems))
        sys.exit(1)


if __name__ == "__main__":
    main()
