"""One vLLM engine in a process of its own: start it, time it, score with it.

    python -m fp8_backend.ab.worker REQUEST.json ANSWER.json

The request is `Request` as JSON; the answer is written again after every measurement.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Repeats that count: at least so many, and short ones more, until these seconds are full. Prefills of 130 ms came out
# 24 % apart in two runs of one arm as medians of 5.
TIMED, TIMED_S, MOST_TIMED = 5, 3.0, 25
# Answers, whose first quartile counts, for longer where the batch is small: a host that others share slows a process by
# 30 % for seconds at a time, and is what a step of one request waits for (0.27 or 0.36 s an answer of either arm:
# samples_s of the file named below). The undisturbed ones are what the machine does, and 3 s may hold none of them.
ANSWERS_S, MOST_ANSWERS = 10.0, 40
# A shape is timed once two runs in a row took the same within 20 %: requests reach the engine one by one, so a batch's
# first steps differ from run to run, and a backend that compiles for each number of tokens goes on doing so (seen:
# -53 ms a token after two runs).
SETTLED, MOST_UNTIMED = 0.2, 12
# Prefills whose prompts came in the fewest steps count, if there are so many: a further step reads the weights once
# more (six layers of DeepSeek-V3 took 70 to 74 ms for 4 x 2048 tokens in one step and 78 to 89 in two: samples_s and
# steps of benchmarks/results/h200/e2e-deepseek-v3-6-layers.json).
LEAST_TOGETHER = 3


@dataclass
class Request:
    """What to measure.

    engine: arguments of vllm.LLM. prefill: (batch, tokens) pairs. vocab: token ids are drawn below it. scored: prompts
    whose next-token distributions are wanted, each in a call of its own. logprobs: how many of the likeliest, -1: all.
    """

    engine: dict[str, Any]
    batches: list[int]
    prefill: list[tuple[int, int]]
    input_len: int
    output_len: int
    vocab: int
    scored: list[list[int]] = field(default_factory=list)
    logprobs: int = -1


def peak_bytes(worker: Any) -> int:
    """Return the most memory the worker's process has used: of its GPU, or resident where it has none."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Run(NamedTuple):
    """What one batch took: seconds as a whole, and of a token behind the first; in how many steps its prompts began."""

    seconds: float
    token_s: float
    steps: int


def name_of(batch: int, input_len: int, output_len: int) -> str:
    """Return what the answer file calls runs of this shape."""
    return f"{batch} x {input_len} + {output_len}"


class Engine:
    """A running vLLM and the questions it is asked."""

    def __init__(self, request: Request) -> None:
        from vllm import LLM

        start = time.monotonic()
        self.llm = LLM(**request.engine)
        self.start_up_s = time.monotonic() - start
        self.request, self._random = request, random.Random(0)
        self.samples: dict[str, list[float]] = {}
        self.steps: dict[str, list[int]] = {}
        self.tokens_ms: dict[str, list[float]] = {}

    def run(self, batch: int, input_len: int, output_len: int) -> Run:
        """Return what one batch of random prompts takes.

        A token is timed by the request that was the last to get its first one: requests reach the engine one by one,
        and whether their prompts come in one step or in two moves the whole by more than a token takes. Tokens and
        steps by the engine's own clock.

        Raises:
            RuntimeError: this vLLM does not say when tokens came.
        """
        from vllm import SamplingParams, __version__

        # Ids below 10 are special tokens in most vocabularies.
        prompts = [
            {"prompt_token_ids": [self._random.randrange(10, self.request.vocab) for _ in range(input_len)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=output_len, min_tokens=output_len, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - start
        if any(output.metrics is None for output in outputs):
            raise RuntimeError(f"vLLM {__version__} does not say when tokens came; use 0.26 to 0.33")
        last = max((output.metrics for output in outputs), key=lambda metrics: metrics.first_token_ts)
        steps = {output.metrics.scheduled_ts for output in outputs}
        return Run(taken, (last.last_token_ts - last.first_token_ts) / max(1, output_len - 1), len(steps))

    def settled(
        self, batch: int, input_len: int, output_len: int, timed_s: float = TIMED_S, most: int = MOST_TIMED
    ) -> list[Run]:
        """Return what `run` does of each run once they have settled; keep what each took in `samples` and `steps`."""
        last = self.run(batch, input_len, output_len).seconds
        for _ in range(MOST_UNTIMED):
            before, last = last, self.run(batch, input_len, output_len).seconds
            if abs(last - before) <= SETTLED * before:
                break
        runs: list[Run] = []
        while len(runs) < TIMED or (sum(run.seconds for run in runs) < timed_s and len(runs) < most):
            runs.append(self.run(batch, input_len, output_len))
        name = name_of(batch, input_len, output_len)
        self.samples[name], self.steps[name] = [round(run.seconds, 6) for run in runs], [run.steps for run in runs]
        return runs

    def tpot_ms(self, batch: int) -> float:
        """Return the milliseconds of one more token of every sequence: the first quartile of all answers.

        A quarter of the answers undisturbed is enough for it. Keep the token time of each in `tokens_ms`.
        """
        shape = batch, self.request.input_len, self.request.output_len
        times = [run.token_s * 1e3 for run in self.settled(*shape, max(TIMED_S, ANSWERS_S / batch), MOST_ANSWERS)]
        self.tokens_ms[name_of(*shape)] = [round(time_ms, 6) for time_ms in times]
        return statistics.quantiles(times, n=4, method="inclusive")[0]

    def prefill_ms(self, batch: int, tokens: int) -> float:
        """Return the median milliseconds from a batch of prompts, taken together, to their first tokens."""
        runs = self.settled(batch, tokens, 1)
        fewest = min(run.steps for run in runs)
        together = [run.seconds for run in runs if run.steps == fewest]
        return statistics.median(together if len(together) >= LEAST_TOGETHER else [run.seconds for run in runs]) * 1e3

    def distributions(self) -> list[dict[str, float]]:
        """Return the log-probabilities of tokens, by id, after every token of the scored prompts."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=self.request.logprobs, detokenize=False)
        rows = []
        for prompt in self.request.scored:
            (output,) = self.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
            for given in output.prompt_logprobs[1:]:  # nothing predicts the first token
                rows.append({str(token): found.logprob for token, found in given.items()})
        return rows

    def shut_down(self) -> None:
        """End the engine's processes, as far as this vLLM can be asked to; the parent kills what is left."""
        try:
            self.llm.llm_engine.engine_core.shutdown()
        except AttributeError:
            pass

    def peak_memory(self) -> tuple[int | None, str | None]:
        """Return the largest of the workers' peaks in bytes, or None and why it is not known."""
        try:
            return max(self.llm.collective_rpc(peak_bytes)), None
        except Exception as error:  # a version that cannot be asked is no reason to lose the times
            return None, f"{type(error).__name__}: {error}"[:200]


def main() -> None:
    """Measure everything the request asks for."""
    raw, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    request = Request(**raw)
    answer: dict[str, Any] = {"tpot_ms": {}, "prefill_ms": {}}

    def write(**found: Any) -> None:
        # Every run that counted, in order: whether an arm grew faster while it was timed shows there.
        answer.update(found, samples_s=engine.samples, steps=engine.steps, tokens_ms=engine.tokens_ms)
        partial = out.with_name(out.name + ".part")
        partial.write_text(json.dumps(answer))
        partial.replace(out)

    engine = Engine(request)
    write(start_up_s=engine.start_up_s)
    for batch in request.batches:
        answer["tpot_ms"][str(batch)] = engine.tpot_ms(batch)
        write()
    for batch, tokens in request.prefill:
        answer["prefill_ms"][f"{batch}x{tokens}"] = engine.prefill_ms(batch, tokens)
        write()
    peak, unknown = engine.peak_memory()
    write(peak_bytes=peak, peak_unknown=unknown)
    if request.scored:
        write(distributions=engine.distributions())
    write(done=True)
    engine.shut_down()
    # Not through the interpreter's own end, where vLLM's threads can abort the process (seen: 1 run of 5, on the CPU).
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
