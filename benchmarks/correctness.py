"""Write benchmarks/results/h200/correctness.json: our kernels and DeepGEMM against float64 of the same codes.

    python -m benchmarks.correctness

Each part is a process of its own with a time limit; one that crashes or hangs is named and the others go on. Exits with
status 1 and the list of what is wrong where an error exceeds 1.1 times DeepGEMM's or an exact property does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from fp8_backend.measure.child import run_child, stop_children_on_signals
from fp8_backend.measure.environment import environment, write_json

# Seconds a part may take. On an H200 the grid is bound by DeepGEMM's compilations, the rest takes seconds.
TIME_LIMITS = {"gemm_errors": 330, "edge_cases": 120, "sanitize": 230}


def run_part(part: str, options: list[str], folder: Path, time_limit: float) -> tuple[dict[str, Any], str | None]:
    """Run one part; return what it wrote, however far it came, and why it failed if it did."""
    out = folder / f"{part}.json"
    command = [sys.executable, "-u", "-m", f"benchmarks.{part}", str(out), *options]
    # DeepGEMM keeps what it compiled here, for one part after the other and no longer.
    failure = run_child(command, folder / f"{part}.log", time_limit, {"DG_JIT_CACHE_DIR": str(folder / "deepgemm")})
    return (json.loads(out.read_text()) if out.exists() else {}), failure


def problems_of(result: dict[str, Any]) -> list[str]:
    """Return one line for everything that is wrong in a result."""
    found = [f"{part}: {failure}" for part, failure in result["env"]["failed_parts"].items()]
    found += result["env"]["failures"]
    for row in result["rows"]:
        if not row["verified"]:
            where = f"m={row['m']} n={row['n']} k={row['k']} {row['case']}"
            errors = f": {row['rel_err']}, DeepGEMM {row.get('deepgemm_rel_err')}" if "rel_err" in row else ""
            found.append(where + errors)
    found += [f"{tool}: {seen}" for tool, seen in result.get("sanitizer", {}).items() if not seen.get("clean")]
    return found


def main() -> None:
    """Run the parts and judge the whole."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correctness", description=__doc__)
    parser.add_argument("--out", type=Path, default=results() / "correctness.json")
    parser.add_argument("--logs", type=Path, help="folder to keep the parts' logs in; default: nowhere")
    parser.add_argument("--commit", help="where the tree is no repository")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="default: a fresh one")
    parser.add_argument("--parts", default=",".join(TIME_LIMITS), help="some of the default, comma-separated")
    parser.add_argument("--small", action="store_true", help="small shapes only, to try the command on a CPU")
    arguments = parser.parse_args()
    stop_children_on_signals()
    print(f"seed {arguments.seed}", flush=True)
    seed = ["--seed", str(arguments.seed)]
    options = {
        "gemm_errors": seed + (["--m", "0,1,17", "--shapes", "200x384,576x256,7x300"] if arguments.small else []),
        "edge_cases": seed + (["--small"] if arguments.small else []),
        "sanitize": [],
    }
    parts = arguments.parts.split(",")
    # A run that is stopped leaves a result that says so.
    failed = dict.fromkeys(parts, "did not end")
    env = {**environment(arguments.commit), "seed": arguments.seed, "deepgemm": {}, "failures": []}
    env["failed_parts"] = failed
    result: dict[str, Any] = {"env": env, "rows": []}
    with tempfile.TemporaryDirectory(prefix="fp8-correctness-") as folder:
        for part in parts:
            start = time.monotonic()
            written, failure = run_part(part, options[part], Path(folder), TIME_LIMITS[part])
            if failure is None:
                del failed[part]
            else:
                failed[part] = failure
            if arguments.logs:
                arguments.logs.mkdir(parents=True, exist_ok=True)
                for log in Path(folder).glob("*.log"):
                    shutil.copy(log, arguments.logs / log.name)
            if part == "sanitize":
                result["sanitizer"] = written.get("sanitizer", {})
            else:
                result["rows"] += written.get("rows", [])
                env["failures"] += written.get("failures", [])
                env["deepgemm"][part] = written.get("deepgemm")
            write_json(arguments.out, result)
            print((Path(folder) / f"{part}.log").read_text(errors="replace"), end="")
            print(f"{part}: {'done' if failure is None else 'FAILED'}, {time.monotonic() - start:.0f} s", flush=True)
    problems = problems_of(result)
    print(f"{len(result['rows'])} rows, {len(problems)} problems, in {arguments.out}")
    if problems:
        print("\n".join(problem[:700] for problem in problems[:40]))
        sys.exit(1)


if __name__ == "__main__":
    main()
