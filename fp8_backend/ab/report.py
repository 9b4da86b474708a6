"""From the runs of two arms to ratios, verdicts and a page of markdown. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import exp, log
from typing import Any

from fp8_backend.ab.logs import names_fp8_kernel, names_ours

LEAST_SPREAD = 0.01  # runs that agree better than this by luck prove nothing


def compare(default: Sequence[float], ours: Sequence[float]) -> tuple[float | None, str]:
    """Return default / ours of the medians, and what may be said of it.

    Above 1 ours is better. A difference counts where it exceeds the spread of either arm's own runs.
    """
    if not default or not ours:
        return None, "not measured"
    ratio = statistics.median(default) / statistics.median(ours)
    if len(default) < 2 or len(ours) < 2:
        return ratio, "inconclusive: fewer than two runs of an arm"
    spread = max(LEAST_SPREAD, *((max(runs) - min(runs)) / statistics.median(runs) for runs in (default, ours)))
    if abs(log(ratio)) <= spread:
        return ratio, f"inconclusive: runs of one arm differ by {spread:.1%}"
    return ratio, f"ours {ratio:.2f}x better" if ratio > 1 else f"ours {1 / ratio:.2f}x worse"


def mean_kl(default: Sequence[dict[str, float]], ours: Sequence[dict[str, float]]) -> float:
    """Return the mean over positions of KL(default || ours) in nats.

    Where not all tokens are known to both arms, the others count as one: then it is a lower bound.

    Args:
        default: log-probability by token, for each position.
        ours: the same positions.
    """
    assert len(default) == len(ours) > 0
    total = 0.0
    for expected, got in zip(default, ours, strict=True):
        common = expected.keys() & got.keys()
        total += sum(exp(expected[token]) * (expected[token] - got[token]) for token in common)
        if common != expected.keys() or common != got.keys():
            rest = [max(1e-12, 1 - sum(exp(row[token]) for token in common)) for row in (expected, got)]
            total += rest[0] * log(rest[0] / rest[1])
    return total / len(default)


def why_no_verdict(runs: Sequence[dict[str, Any]], default_is_fp8: bool) -> str | None:
    """Return why the runs prove nothing about kernels, or None."""
    for run in runs:
        lines = run["selection"]
        if run["arm"] == "ours" and not names_ours(lines):
            return "a log of ours does not say that its linears use fp8_backend"
        if run["arm"] == "default" and names_ours(lines):
            return "a log of the default says that its linears use fp8_backend"
        if run["arm"] == "default" and default_is_fp8 and not names_fp8_kernel(lines):
            return "a log of the default does not name the kernel of its FP8 linears"
    return None


def rows(
    model: str, runs: Sequence[dict[str, Any]], no_verdict: str | None, start_up: str = "start-up"
) -> list[dict[str, Any]]:
    """Return one row for each batch, prefill, start-up time and peak memory.

    start_up: what the start-up times are called (`setup.Conditions.start_up`).
    """
    complete = [run["answer"] | {"arm": run["arm"]} for run in runs if run["failure"] is None]

    def row(what: dict[str, Any], unit: str, values: dict[str, list[float]]) -> dict[str, Any]:
        ratio, verdict = compare(values["default"], values["ours"])
        medians = {arm: round(statistics.median(found), 3) if found else None for arm, found in values.items()}
        return {
            "model": model,
            **what,
            f"default_{unit}": medians["default"],
            f"ours_{unit}": medians["ours"],
            "ratio": None if ratio is None else round(ratio, 3),
            "verdict": f"none: {no_verdict}" if no_verdict else verdict,
            "runs": {arm: [round(value, 3) for value in found] for arm, found in values.items()},
        }

    def values(kind: str, key: str | None = None, scale: float = 1.0) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {"default": [], "ours": []}
        for answer in complete:
            value = answer.get(kind) if key is None else answer[kind].get(key)
            if value is not None:
                found[answer["arm"]].append(value * scale)
        return found

    result = []
    for batch in dict.fromkeys(key for answer in complete for key in answer["tpot_ms"]):
        result.append(row({"batch": int(batch)}, "ms", values("tpot_ms", batch)))
    for prefill in dict.fromkeys(key for answer in complete for key in answer["prefill_ms"]):
        result.append(row({"prefill": prefill}, "ms", values("prefill_ms", prefill)))
    result.append(row({"what": start_up}, "s", values("start_up_s")))
    result.append(row({"what": "peak memory"}, "gib", values("peak_bytes", scale=2**-30)))
    return result


def name_of(row: dict[str, Any]) -> str:
    """Return what a row measures, with its unit."""
    if "batch" in row:
        return f"TPOT, batch {row['batch']} (ms)"
    if "prefill" in row:
        return f"prefill {row['prefill']} (ms)"
    return f"{row['what']} ({'s' if 'ours_s' in row else 'GiB'})"


def what_a_figure_is(runs: Sequence[dict[str, Any]]) -> str:
    """Return what the table's figures are; results without `tokens_ms` took the median of answers, too."""
    tokens = "first quartile" if any("tokens_ms" in run["answer"] for run in runs) else "median"
    return f"Of a run: tokens the {tokens} of its answers, prefills the median. Of an arm: the median of its runs."


def markdown(result: dict[str, Any]) -> str:
    """Return the page: the table, accuracy, what each arm chose, and what failed."""
    env = result["env"]
    where = (env["gpu"] or {}).get("name") or f"CPU, {env['cpus']} cores: shows that it works, not how fast a GPU is"
    lines = [f"# {result['model']}: default backend and fp8_backend", "", f"On {where}. `{env['command']}`", ""]
    said = [f"Default arm: {result['default']}", f"Weights: {result['weights']}", f"Runs: {result['order']}"]
    said += [f"Routing: {result['routing']}"] if "routing" in result else []  # not in results of before
    lines += [". ".join(said) + ".", ""]
    lines += ["| | default | ours | default / ours | verdict | runs |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        default, ours = (next((row[key] for key in row if key.startswith(arm)), None) for arm in ("default_", "ours_"))
        runs = "; ".join(f"{arm} {', '.join(map(str, found))}" for arm, found in row["runs"].items())
        lines.append(f"| {name_of(row)} | {default} | {ours} | {row['ratio']} | {row['verdict']} | {runs} |")
    lines += ["", what_a_figure_is(result["runs"])]
    lines += ["", f"Mean KL(default, ours): {result['kl']}", ""]
    for run in result["runs"]:
        lines += [f"## Run {run['number']}, {run['arm']}", ""]
        lines += [f"FAILED: {run['failure']}", ""] if run["failure"] else []
        lines += [*(f"    {line}" for line in run["selection"] or ["its log names no kernel"]), ""]
    return "\n".join(lines)
