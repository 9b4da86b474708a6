"""Runs one vLLM engine in a process of its own and writes what it said as JSON.

Usage: python tests/vllm_worker.py request.json answer.json
The request holds `engine` (arguments of vllm.LLM), `prompts` (lists of token ids) and, where asked for, `events`: what
to do to the engine after the first answers, each followed by the same questions again; or `refused`, a folder that
it must not reload from, followed by the same questions. With `pieces` a CPU compiles as a GPU does.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    if request.get("pieces"):
        compile_in_pieces()
    from vllm import LLM

    llm = LLM(
        **{"enforce_eager": True, **request["engine"]},
        max_model_len=256,
        max_logprobs=-1,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        gpu_memory_utilization=0.05,  # of memory; on the CPU too, despite its name
        kv_cache_memory_bytes=1 << 28,
    )
    answer = ask(llm, request["prompts"])
    answer["events"] = []
    for event in request.get("events", []):
        happen(llm, event)
        answer["events"].append(ask(llm, request["prompts"]))
    if folder := request.get("refused"):
        answer["refusal"] = refusal(llm, folder)
        answer["events"].append(ask(llm, request["prompts"]))
    Path(sys.argv[2]).write_text(json.dumps(answer))


def compile_in_pieces() -> None:
    """Let a CPU run vLLM's compilation of pieces with its passes, which it replaces by torch.compile alone."""
    from vllm.config import CompilationMode, VllmConfig
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config.__func__

    def keep_the_mode(cls: type, config: VllmConfig) -> None:
        compilation = config.compilation_config
        mode = compilation.mode
        check(cls, config)
        if current_platform.is_cpu() and mode == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.ir_enable_torch_wrap, compilation.compile_sizes = mode, True, []
            # These are for GPUs, and not even imported on a CPU.
            compilation.pass_config.fuse_norm_quant = compilation.pass_config.fuse_act_quant = False

    platform.check_and_update_config = classmethod(keep_the_mode)


def ask(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Return the distribution at every prompt token but the first, which nothing predicts, and of 16 greedy tokens."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=16, logprobs=-1, prompt_logprobs=-1, ignore_eos=True)
    scored = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], parameters)
    return {
        "logprobs": [
            [[row[token].logprob for token in sorted(row)] for row in output.prompt_logprobs[1:]] for output in scored
        ],
        "steps": [
            [[row[token].logprob for token in sorted(row)] for row in output.outputs[0].logprobs] for output in scored
        ],
        "tokens": [list(output.outputs[0].token_ids) for output in scored],
    }


def refusal(llm: Any, folder: str) -> str:
    """Return why weights are not reloaded from a folder."""
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    except Exception as error:  # of any type, in any process
        return str(error)
    raise SystemExit(f"{folder} was reloaded")


def happen(llm: Any, event: str) -> None:
    """Reload the weights from where they came from, or sleep and wake up: level 2 forgets the weights."""
    if event == "reload":
        llm.collective_rpc("reload_weights")
    elif event == "sleep 1":
        llm.sleep(level=1)
        llm.wake_up()
    elif event == "sleep 2":
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
    else:
        raise ValueError(event)


if __name__ == "__main__":
    main()
