"""`make demo`: generate an FP8 checkpoint, serve it through fp8_backend, compare it with its bf16 twin.

    python -m demo.run

Exits with status 1 and the reason where anything fails.
"""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from pathlib import Path

from demo.architectures import SIZES
from demo.checkpoint import write_checkpoint
from demo.install import ROOT, hopper_gpu
from demo.server import Completion, DemoError, Server
from demo.twin import dequantize_checkpoint
from fp8_backend.errors import Fp8BackendError
from fp8_backend.weights.checkpoint import verify_checkpoint

FOLDER = ROOT / ".demo"
PROMPTS = ("once upon a time there was a young dog", "snow on the mountain and a red moon", "one two three four five")
MAX_TOKENS = 32
# A rounding may decide between two tokens of nearly the same log-probability. FP8 activations move a difference of two
# by about 0.03 here (mean KL 0.0004); a wrong layer moves it by 1 and more.
NEAR_TIE = 0.2
SUMMARY = re.compile(r"\d+ of \d+ linears.*")


def main() -> None:
    """Run the demo; exit with its status."""
    # An ended terminal or `kill` stops the servers as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("stopped by a signal"))
    try:
        run()
    except (DemoError, Fp8BackendError) as error:
        sys.exit(f"make demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the server is stopped")


def run() -> None:
    """Serve the FP8 checkpoint and its twin one after the other and print what was seen."""
    gpu = hopper_gpu()
    fp8, bf16 = make_checkpoints()
    arguments, environment = serve_options(gpu)
    print(f"Serving on {gpu or 'the CPU, with --enforce-eager: compiling would take longer than it saves'}")
    print(f"  vllm serve {fp8.relative_to(ROOT)} --quantization deepgemm_fp8 {' '.join(arguments)}", flush=True)
    with Server(fp8, FOLDER / "server-fp8.log", ["--quantization", "deepgemm_fp8", *arguments], environment) as server:
        print(f"  up after {server.started_s:.0f} s")
        print(f"  {summary_line(server)}")
        ours = complete_all(server)
    print("Serving its bf16 twin without the plugin's method, to compare", flush=True)
    with Server(bf16, FOLDER / "server-bf16.log", arguments, environment) as server:
        theirs = complete_all(server)
    for prompt, ours_of_prompt, theirs_of_prompt in zip(PROMPTS, ours, theirs, strict=True):
        print(f"  {prompt!r}: {compare(ours_of_prompt, theirs_of_prompt)}")
    print("Both servers are stopped. The model is random: its text means nothing, that both agree on it does.")


def make_checkpoints() -> tuple[Path, Path]:
    """Write the DeepSeek-V3-shaped demo checkpoint and its bf16 twin afresh; return their folders."""
    fp8, bf16 = FOLDER / "deepseek-v3-fp8", FOLDER / "deepseek-v3-bf16"
    shutil.rmtree(fp8, ignore_errors=True)
    shutil.rmtree(bf16, ignore_errors=True)
    write_checkpoint(fp8, "deepseek_v3", SIZES["deepseek_v3", "demo"])
    dequantize_checkpoint(fp8, bf16)
    summary = verify_checkpoint(fp8)
    print(
        f"{fp8.relative_to(ROOT)}: {summary.architecture}, {summary.layers} layers, {summary.fp8_weights} FP8 "
        f"weights, {summary.fp8_bytes / 1e6:.0f} MB in {summary.shards} shards"
    )
    return fp8, bf16


def serve_options(gpu: str | None) -> tuple[list[str], dict[str, str]]:
    """Return arguments and environment common to both servers."""
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    arguments = ["--max-model-len", "512", "--max-num-seqs", "8"]
    if gpu:
        # A fraction of one GPU: the model is tiny, and someone else may be using the rest.
        return [*arguments, "--gpu-memory-utilization", "0.2"], environment
    return [*arguments, "--enforce-eager"], {**environment, "VLLM_CPU_KVCACHE_SPACE": "1"}  # in GiB


def summary_line(server: Server) -> str:
    """Return the line in which the plugin says which layers it serves.

    Raises:
        DemoError: the log holds no such line.
    """
    found = SUMMARY.search(server.log.read_text(errors="replace"))
    if found is None:
        raise DemoError(f"the log has no line on fp8_backend's layers: the plugin did not load; {server.end_of_log()}")
    return found[0]


def complete_all(server: Server) -> list[Completion]:
    """Send every prompt, print the continuations and the speed."""
    begin = time.monotonic()
    completions = [server.complete(prompt, MAX_TOKENS) for prompt in PROMPTS]
    seconds = time.monotonic() - begin
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        print(f"  {prompt!r} ->{completion.text!r}")
    tokens = sum(len(completion.tokens) for completion in completions)
    print(f"  {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s, one request at a time", flush=True)
    return completions


def compare(ours: Completion, theirs: Completion) -> str:
    """Say how many greedy tokens agree before the first that does not.

    Raises:
        DemoError: the twin holds our token at the first disagreement for clearly worse than its own.
    """
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    same = next((position for position, (mine, other) in enumerate(pairs) if mine != other), len(theirs.tokens))
    if same == len(theirs.tokens):
        return f"all {same} greedy tokens are those of bf16"
    alternatives = theirs.alternatives[same]
    chosen = alternatives[theirs.tokens[same]]
    gap = chosen - alternatives.get(ours.tokens[same], float("-inf"))
    if gap > NEAR_TIE:
        raise DemoError(
            f"greedy token {same + 1} of {len(theirs.tokens)} differs from bf16, which holds it for worse by {gap:.2f} "
            f"in log-probability; a near tie is at most {NEAR_TIE}; compare the logs in {FOLDER}"
        )
    return f"{same} of {len(theirs.tokens)} greedy tokens are those of bf16, then a near tie ({gap:.3f} apart)"


if __name__ == "__main__":
    main()
