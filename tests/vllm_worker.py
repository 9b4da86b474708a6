"""Runs one vLLM engine in a process of its own and writes what it said as JSON.

Usage: python tests/vllm_worker.py request.json answer.json
The request holds `engine` (arguments of vllm.LLM) and `prompts` (lists of token ids).
"""

import json
import sys
from pathlib import Path


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

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
    prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
    scored = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=-1, ignore_eos=True))
    answer = {
        # One row of the whole vocabulary per prompt token but the first, which nothing predicts.
        "logprobs": [
            [[row[token].logprob for token in sorted(row)] for row in output.prompt_logprobs[1:]] for output in scored
        ],
        "tokens": [list(output.outputs[0].token_ids) for output in scored],
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
