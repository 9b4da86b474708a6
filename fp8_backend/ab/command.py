"""`fp8-backend ab MODEL`: the same vLLM with its default backend and with ours, in fresh processes, order A B B A."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fp8_backend.ab import report
from fp8_backend.ab.logs import selection_lines
from fp8_backend.ab.models import CONFIGS, find_model
from fp8_backend.ab.setup import Conditions, Setup, child_environment, engine_arguments, prepare
from fp8_backend.ab.worker import Request
from fp8_backend.errors import ArgumentError, UnsupportedError
from fp8_backend.measure.child import run_child, stop_children_on_signals
from fp8_backend.measure.environment import environment, write_json

ORDER = ("default", "ours", "ours", "default")
FULL_VOCABULARY = 20_000  # up to here every token's log-probability is compared, beyond it the likeliest
LIKELIEST = 256
# One prompt for the kernels of few tokens, one for those of many: 190 positions.
SCORED_LENGTHS = (48, 144)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "model",
        type=Path,
        nargs="?",
        help=f"a checkpoint; or with dummy weights a folder with config.json alone, or one of {', '.join(CONFIGS)}",
    )
    parser.add_argument("--batches", default="1,8,32", help="batch sizes of TPOT, comma-separated")
    parser.add_argument("--prefill", default="4x2048", help="batch x tokens, comma-separated; none")
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens of TPOT")
    parser.add_argument("--output-len", type=int, default=129, help="tokens of TPOT's long answer")
    parser.add_argument("--rounds", type=int, default=1, help="times default, ours, ours, default")
    parser.add_argument("--kv-gib", type=float, help="KV cache of both arms; default: 8 on a GPU, 0.25 on a CPU")
    parser.add_argument(
        "--skip-deepgemm-warmup",
        action="store_true",
        help="of both arms (it takes the default minutes): kernels compile in the calls that need them, which are not "
        "timed, and the start-up time says so",
    )
    parser.add_argument(
        "--caches",
        type=Path,
        metavar="DIR",
        help="keep compile caches here and let runs share them: from an arm's second run on its start-up is a warm "
        "one, and the start-up time says so",
    )
    parser.add_argument(
        "--even-routing",
        action="store_true",
        help="of both arms: vLLM draws each token's experts at random. Routers of dummy weights send most tokens to "
        "the same few, and which these are depends on the last bits of either arm's numbers",
    )
    parser.add_argument("--run-limit", type=float, default=900, metavar="S", help="seconds after which a run is ended")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds after which no run is started")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs that --out already holds")
    parser.add_argument("--out", type=Path, help="folder of report.md, e2e.json, chart.png, logs; default: ab-<model>")
    parser.add_argument("--from", type=Path, dest="recorded", metavar="JSON", help="write the report of these runs")
    parser.add_argument("--commit", help="recorded in the result where the tree is no repository")


def _numbers(name: str, text: str) -> list[int]:
    try:
        found = [int(number) for number in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ArgumentError(f"{name} {text}: expected numbers above 0, comma-separated")
    return found


def request_for(arguments: argparse.Namespace, setup: Setup) -> Request:
    """Return what every run of either arm measures, without its engine arguments.

    Raises:
        ArgumentError: a list that cannot be read, or more tokens than the model takes.
    """
    batches = _numbers("--batches", arguments.batches)
    prefill = []
    for text in () if arguments.prefill == "none" else arguments.prefill.split(","):
        batch, tokens = (_numbers("--prefill", text.replace("x", ",")) + [0, 0])[:2]
        if not tokens or text.count("x") != 1:
            raise ArgumentError(f"--prefill {text}: expected batch x tokens, such as 4x2048, or none")
        prefill.append((batch, tokens))
    if arguments.output_len < 2 or arguments.input_len < 1:
        raise ArgumentError("--output-len must be at least 2 and --input-len at least 1")
    longest = max([arguments.input_len + arguments.output_len, *(tokens + 1 for _, tokens in prefill)])
    if longest > setup.max_model_len:
        raise ArgumentError(
            f"{longest} tokens of a sequence; {setup.model.name} takes {setup.max_model_len}; ask for fewer"
        )
    lengths = [min(length, setup.max_model_len - 1) for length in SCORED_LENGTHS] if setup.has_weights else []
    draw = random.Random(0)
    return Request(
        engine={},
        batches=batches,
        prefill=prefill,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        vocab=setup.vocab,
        scored=[[draw.randrange(10, setup.vocab) for _ in range(length)] for length in lengths],
        logprobs=-1 if setup.vocab <= FULL_VOCABULARY else LIKELIEST,
    )


def run_arm(
    arm: str,
    number: int,
    setup: Setup,
    request: Request,
    out: Path,
    limit_s: float,
    conditions: Conditions,
) -> dict[str, Any]:
    """Run one arm in a process of its own; return what it measured and what its log says."""
    request.engine = engine_arguments(setup, arm, request)
    name = f"run-{number}-{arm}"
    asked, answer, log = (out / f"{name}{suffix}" for suffix in (".request.json", ".answer.json", ".log"))
    asked.write_text(json.dumps(asdict(request)))
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "fp8_backend.ab.worker", str(asked), str(answer)]
    with tempfile.TemporaryDirectory(prefix="fp8-ab-") as caches:
        environment = child_environment(conditions.caches or Path(caches), conditions)
        failure = run_child(command, log, limit_s, environment)
    found = json.loads(answer.read_text()) if answer.exists() else {"tpot_ms": {}, "prefill_ms": {}}
    if found.get("done"):
        failure = None  # everything was measured; how the process ended does not matter
    lines = selection_lines(log.read_text(errors="replace"))
    run = {"number": number, "arm": arm, "failure": failure, "selection": lines, "answer": found}
    run |= {"start_up": conditions.start_up, "routing": conditions.routing}
    (out / f"{name}.json").write_text(json.dumps(run))
    return run


def kept_run(path: Path, conditions: Conditions) -> dict[str, Any] | None:
    """Return the run that `run_arm` wrote here, or None if none ended well, or one under other conditions.

    One without `tokens_ms` timed tokens by the median of its answers, which is no match for a first quartile.
    """
    if not path.exists():
        return None
    run: dict[str, Any] = json.loads(path.read_text())
    asked = {"failure": None, "start_up": conditions.start_up, "routing": conditions.routing}
    return run if asked.items() <= run.items() and "tokens_ms" in run["answer"] else None


def _kl(runs: list[dict[str, Any]], setup: Setup, request: Request, conditions: Conditions) -> float | str:
    """Return the mean KL between the first complete run of each arm, or why there is none."""
    if conditions.even_routing:
        return "not measured: experts are drawn anew in each run"
    if not setup.has_weights:
        return "not measured: dummy weights, whose logits mean nothing"
    first: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if "distributions" in run["answer"]:
            first.setdefault(run["arm"], run["answer"]["distributions"])
    if len(first) < 2:
        return "not measured: an arm has no complete run"
    kl = report.mean_kl(first["default"], first["ours"])
    if request.logprobs == -1:
        return round(kl, 6)
    return f"at least {kl:.6f} (the {LIKELIEST} likeliest tokens of either arm, the others as one)"


def _conditions(arguments: argparse.Namespace) -> Conditions:
    caches = arguments.caches.resolve() if arguments.caches else None
    return Conditions(not arguments.skip_deepgemm_warmup, caches, arguments.even_routing)


def _result(
    conditions: Conditions, setup: Setup, request: Request, runs: list[dict[str, Any]], env: dict[str, Any]
) -> dict[str, Any]:
    no_verdict = report.why_no_verdict(runs, setup.default_is_fp8)
    shown = [{**run, "answer": {k: v for k, v in run["answer"].items() if k != "distributions"}} for run in runs]
    return {
        "env": env,
        "model": setup.model.name,
        "default": setup.default_text,
        "weights": "those of the checkpoint" if setup.has_weights else "dummy (no safetensors in the folder)",
        "routing": conditions.routing,
        "order": " ".join(run["arm"] for run in runs),
        "kl": _kl(runs, setup, request, conditions),
        "no_verdict": no_verdict,
        "runs": shown,
        "rows": report.rows(setup.model.name, runs, no_verdict, conditions.start_up),
    }


def _say(run: dict[str, Any], seconds: float) -> None:
    answer = run["answer"]
    tpot = ", ".join(f"{batch}: {ms:.2f}" for batch, ms in answer["tpot_ms"].items())
    prefill = ", ".join(f"{size}: {ms:.1f}" for size, ms in answer["prefill_ms"].items())
    print(
        f"run {run['number']}, {run['arm']}: {seconds:.0f} s, start-up {answer.get('start_up_s', float('nan')):.1f} s, "
        f"TPOT ms {{{tpot}}}, prefill ms {{{prefill}}}"
        + (f", FAILED: {run['failure'][-1500:]}" if run["failure"] else ""),
        flush=True,
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the arms in turns; return 0 if every run finished and a verdict may be given, else 1."""
    if arguments.recorded:
        _write(json.loads(arguments.recorded.read_text()), arguments.out or arguments.recorded.parent)
        return 0
    if arguments.model is None:
        raise ArgumentError("no model; give the folder of a checkpoint, or --from with an e2e.json")
    stop_children_on_signals()
    begin = time.monotonic()
    out = arguments.out or Path(f"ab-{arguments.model.resolve().name}")
    out.mkdir(parents=True, exist_ok=True)
    env = {**environment(arguments.commit), "missing_runs": []}
    runs: list[dict[str, Any]] = []
    conditions = _conditions(arguments)
    with tempfile.TemporaryDirectory(prefix="fp8-ab-twin-") as scratch:
        # What vLLM keeps of torch.compile holds for a model's path: one that is named needs the same in the next call.
        model = find_model(arguments.model, conditions.caches or Path(scratch))
        setup = prepare(model, arguments.kv_gib, Path(scratch))
        request = request_for(arguments, setup)
        print(f"{setup.model.name}: default arm is {setup.default_text}", flush=True)
        for number, arm in enumerate(ORDER * arguments.rounds, 1):
            if arguments.resume and (run := kept_run(out / f"run-{number}-{arm}.json", conditions)):
                runs.append(run)
                print(f"run {number}, {arm}: kept", flush=True)
                continue
            start = time.monotonic()
            if arguments.deadline and start > begin + arguments.deadline:
                env["missing_runs"].append(f"run {number}, {arm}: not started before --deadline; use --resume")
                continue
            runs.append(run_arm(arm, number, setup, request, out, arguments.run_limit, conditions))
            _say(runs[-1], time.monotonic() - start)
            write_json(out / "e2e.json", _result(conditions, setup, request, runs, env))
    result = _result(conditions, setup, request, runs, env)
    write_json(out / "e2e.json", result)
    _write(result, out)
    failed = [run for run in runs if run["failure"] is not None]
    return 1 if failed or env["missing_runs"] or result["no_verdict"] else 0


def _write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    page = report.markdown(result)
    (out / "report.md").write_text(page + "\n")
    print(page)
    print("\n".join(result["env"]["missing_runs"]))
    try:
        from fp8_backend.ab.chart import chart

        chart(result, out / "chart.png")
        print(f"in {out}: report.md, e2e.json, chart.png")
    except UnsupportedError as error:
        print(f"in {out}: report.md, e2e.json; no chart: {error}")
