"""The ab command: its arithmetic on recorded runs, what it refuses, and one real engine."""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
from collections.abc import Callable
from math import log
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from demo.architectures import SIZES
from demo.checkpoint import write_checkpoint
from fp8_backend import cli
from fp8_backend.ab import command, report, setup, worker
from fp8_backend.ab.logs import names_fp8_kernel, names_ours, selection_lines
from fp8_backend.ab.models import CONFIGS, find_model
from fp8_backend.errors import CheckpointError, UnsupportedError
from fp8_backend.weights.formats import read_format

OURS = ["12 of 12 linears: fp8_backend sm90; fell back: none"]
STOCK = ["Selected DeepGemmFp8BlockScaledMMKernel for Fp8LinearMethod"]


def run(number: int, arm: str, tpot: float, prefill: float, failure: str | None = None) -> dict:
    answer = {
        "start_up_s": 80.0 + number,
        "tpot_ms": {"1": tpot, "8": tpot + 0.5},
        "prefill_ms": {"4x2048": prefill},
        "peak_bytes": 2**30 * (12 if arm == "ours" else 13),
        "tokens_ms": {"1 x 64 + 129": [tpot], "8 x 64 + 129": [tpot + 0.5]},
    }
    lines = OURS if arm == "ours" else STOCK
    return {"number": number, "arm": arm, "failure": failure, "selection": lines, "answer": answer}


# Synthetic: ours faster in TPOT beyond doubt, prefill within the spread.
RUNS = [
    run(1, "default", 4.0, 120.0),
    run(2, "ours", 3.0, 124.0),
    run(3, "ours", 3.1, 116.0),
    run(4, "default", 4.1, 121.0),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ab") / "qwen3"
    write_checkpoint(folder, "qwen3", SIZES["qwen3", "demo"])
    return folder


@pytest.mark.parametrize(
    ("default", "ours", "verdict"),
    [
        ([4.0, 4.1], [3.0, 3.1], "ours 1.33x better"),
        ([3.0, 3.0], [4.0, 4.0], "ours 1.33x worse"),
        ([4.0, 4.4], [4.0, 3.8], "inconclusive: runs of one arm differ by 9.5%"),
        ([4.0, 4.0], [3.99, 3.99], "inconclusive: runs of one arm differ by 1.0%"),
        ([4.0], [3.0, 3.0], "inconclusive: fewer than two runs of an arm"),
        ([], [3.0], "not measured"),
    ],
)
def test_verdicts(default: list[float], ours: list[float], verdict: str) -> None:
    assert report.compare(default, ours)[1] == verdict


class Scripted(worker.Engine):
    """An engine whose batches take the given seconds, and each further token a tenth of them."""

    def __init__(self, times: list[float], begun: Callable[[int], int] = lambda _: 1) -> None:
        self.times, self.asked, self.samples, self.steps, self.begun = times, 0, {}, {}, begun
        self.tokens_ms = {}
        self.request = worker.Request({}, [8], [], 1024, 1, 100, [])

    def run(self, batch: int, input_len: int, output_len: int) -> worker.Run:
        """Return the next of the times; the last one from then on."""
        assert (input_len, output_len) == (1024, 1)
        self.asked += 1
        taken = self.times[min(self.asked, len(self.times)) - 1]
        return worker.Run(taken, taken / 10, self.begun(self.asked))


@pytest.mark.parametrize(
    ("seconds", "timed"), [(1.0, worker.TIMED), (0.25, 12), (0.01, worker.MOST_TIMED)], ids=["long", "short", "least"]
)
def test_short_runs_are_repeated_more_often(seconds: float, timed: int) -> None:
    engine = Scripted([seconds])
    engine.prefill_ms(8, 1024)
    assert engine.asked == 2 + timed


@pytest.mark.parametrize(
    ("times", "untimed", "median", "quartile"),
    [
        ([2.0, 2.3, 7.0, 1.0, 3.0, 2.0, 4.0], 2, 3.0, 2.0),  # the first two are alike; none of them counts
        ([9.0, 5.0, 3.0, 2.5, 2.0, 2.0, 8.0, 2.2, 2.1], 4, 2.1, 2.0),
        ([1.0, 2.0, 1.0, 2.0] * 3 + [1.0, 6.0, 5.0, 4.0, 7.0, 3.0], 13, 5.0, 4.0),  # never settles: timed all the same
    ],
)
def test_times_count_once_two_in_a_row_agree(times: list[float], untimed: int, median: float, quartile: float) -> None:
    engine = Scripted(times)
    assert engine.prefill_ms(8, 1024) == median * 1e3
    assert engine.asked == untimed + worker.TIMED
    assert list(engine.samples) == ["8 x 1024 + 1"] and len(engine.samples["8 x 1024 + 1"]) == worker.TIMED
    assert Scripted(times).tpot_ms(8) == pytest.approx(quartile * 100)


@pytest.mark.parametrize(
    ("batch", "seconds", "timed"),
    [(1, 3.0, worker.TIMED), (1, 0.5, 20), (2, 0.5, 10), (8, 0.5, 6), (1, 0.01, worker.MOST_ANSWERS)],
)
def test_answers_of_one_request_are_timed_for_longer(batch: int, seconds: float, timed: int) -> None:
    engine = Scripted([seconds])
    assert engine.tpot_ms(batch) == pytest.approx(seconds * 100) and engine.asked == 2 + timed
    assert engine.tokens_ms == {f"{batch} x 1024 + 1": pytest.approx([seconds * 100] * timed)}
    engine = Scripted([seconds])
    engine.prefill_ms(8, 1024)
    assert engine.tokens_ms == {}


def test_a_token_is_what_a_quarter_of_undisturbed_answers_took() -> None:
    """A host that slows the process for most of the time moves the median and not the figure."""
    engine = Scripted([0.27, 0.27, *[0.36] * 18, *[0.27] * 10, *[0.36] * 12])
    assert engine.tpot_ms(1) == pytest.approx(27)
    assert statistics.median(engine.tokens_ms["1 x 1024 + 1"]) == pytest.approx(36)


@pytest.mark.parametrize(("among", "ms"), [(2, 300.0), (4, 500.0)], ids=["every second", "too few"])
def test_prefills_count_whose_prompts_came_together(among: int, ms: float) -> None:
    """Of the timed runs, 7 or 8, some; the others took two steps."""
    engine = Scripted([0.5, 0.5, *([0.5] * (among - 1) + [0.3]) * 9], lambda number: 1 + bool((number - 2) % among))
    assert engine.prefill_ms(8, 1024) == ms
    assert sorted(set(engine.steps["8 x 1024 + 1"])) == [1, 2]


def outputs_of(*stamps: tuple[float, float, float]) -> list[SimpleNamespace]:
    """Return what vLLM gives of requests that began, and whose first and last tokens came, so."""
    names = "scheduled_ts", "first_token_ts", "last_token_ts"
    return [SimpleNamespace(metrics=SimpleNamespace(**dict(zip(names, stamp, strict=True)))) for stamp in stamps]


def test_a_token_is_timed_by_the_request_that_joined_last() -> None:
    """The others' first tokens came in steps of fewer sequences, or waited for another prompt."""
    engine = Scripted([])
    engine.request, engine._random = worker.Request({}, [3], [], 4, 5, 100, []), random.Random(0)
    stamps = (0.1, 1.0, 9.5), (0.2, 2.0, 10.0), (0.1, 1.5, 9.9)
    answers = [outputs_of(*stamps), [SimpleNamespace(metrics=None)]]
    engine.llm = SimpleNamespace(generate=lambda *_, **__: answers.pop(0))
    assert worker.Engine.run(engine, 3, 4, 5)[1:] == (2.0, 2)
    with pytest.raises(RuntimeError, match="when tokens came"):
        worker.Engine.run(engine, 1, 4, 5)


def test_conditions_say_what_they_leave_out_and_reach_the_run(tmp_path: Path) -> None:
    asked = setup.Conditions(deepgemm_warmup=False, caches=tmp_path, even_routing=True)
    (row,) = [row for row in report.rows("m", RUNS, None, asked.start_up) if "start-up" in row.get("what", "")]
    assert report.name_of(row) == "start-up with kept caches without DeepGEMM's warm-up (s)"
    assert setup.Conditions().start_up == "start-up" and asked.routing != setup.Conditions().routing
    drawn, plain = (setup.child_environment(tmp_path, each) for each in (asked, setup.Conditions()))
    assert drawn["VLLM_DEEP_GEMM_WARMUP"] == "skip" and "VLLM_DEEP_GEMM_WARMUP" not in plain
    routers = [each["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] for each in (drawn, plain)]
    assert routers == ["uniform_random", ""]  # also where the caller's environment draws them


def test_a_run_is_kept_under_its_own_conditions_alone(tmp_path: Path) -> None:
    path, plain = tmp_path / "run-1-default.json", setup.Conditions()
    assert command.kept_run(path, plain) is None
    cold = setup.Conditions(deepgemm_warmup=False)
    path.write_text(json.dumps(RUNS[0] | {"start_up": cold.start_up, "routing": cold.routing}))
    assert command.kept_run(path, cold) is not None
    assert command.kept_run(path, plain) is None
    assert command.kept_run(path, setup.Conditions(deepgemm_warmup=False, even_routing=True)) is None
    old = run(1, "default", 4.0, 120.0) | {"start_up": plain.start_up, "routing": plain.routing}
    path.write_text(json.dumps(old))
    assert command.kept_run(path, plain) is not None
    del old["answer"]["tokens_ms"]  # its tokens are medians
    path.write_text(json.dumps(old))
    assert command.kept_run(path, plain) is None
    killed = run(1, "default", 4.0, 120.0, "killed")
    path.write_text(json.dumps(killed | {"start_up": plain.start_up, "routing": plain.routing}))
    assert command.kept_run(path, plain) is None


def test_no_kl_of_experts_drawn_at_random() -> None:
    found = command._kl(RUNS, None, None, setup.Conditions(even_routing=True))  # type: ignore[arg-type]
    assert found == "not measured: experts are drawn anew in each run"


def test_rows() -> None:
    found = report.rows("m", RUNS, report.why_no_verdict(RUNS, True))
    assert [report.name_of(row) for row in found] == [
        "TPOT, batch 1 (ms)",
        "TPOT, batch 8 (ms)",
        "prefill 4x2048 (ms)",
        "start-up (s)",
        "peak memory (GiB)",
    ]
    first = found[0]
    assert (first["default_ms"], first["ours_ms"], first["ratio"]) == (4.05, 3.05, 1.328)
    assert first["verdict"].startswith("ours 1.33x") and found[2]["verdict"].startswith("inconclusive")
    assert found[4]["default_gib"] == 13


def test_a_failed_run_does_not_count() -> None:
    found = report.rows("m", [*RUNS[:3], run(4, "default", 1.0, 1.0, "killed")], None)
    assert found[0]["runs"]["default"] == [4.0] and found[0]["verdict"].startswith("inconclusive: fewer")


@pytest.mark.parametrize(
    ("arm", "lines", "reason"),
    [
        ("ours", [], "a log of ours does not say that its linears use fp8_backend"),
        ("ours", ["0 of 12 linears: fp8_backend sm90; fell back: 12 linears"], "a log of ours does not say"),
        ("ours", ["9 of 9 linears: fp8_backend sm90; 0 of 3 MoE layers: fp8_backend sm90"], "a log of ours does not"),
        ("default", OURS, "a log of the default says that its linears use fp8_backend"),
        ("default", ["Using FlashAttention backend"], "does not name the kernel of its FP8 linears"),
    ],
)
def test_no_verdict_without_the_kernels_names(arm: str, lines: list[str], reason: str) -> None:
    assert report.why_no_verdict(RUNS, True) is None
    wrong = [*RUNS, {**run(5, arm, 1.0, 1.0), "selection": lines}]
    why = report.why_no_verdict(wrong, True)
    assert why is not None and reason in why
    assert report.rows("m", wrong, why)[0]["verdict"] == f"none: {why}"


def test_a_twin_need_not_name_an_fp8_kernel() -> None:
    twin = [{**found, "selection": []} if found["arm"] == "default" else found for found in RUNS]
    assert report.why_no_verdict(twin, False) is None


def test_selection_lines_are_read_from_a_log() -> None:
    log_text = (
        "(EngineCore pid=7) INFO 11-22 14:00:00 [__init__.py:7] Selected CutlassFp8BlockScaledMMKernel for X\n"
        "INFO 11-22 14:00:01 [summary.py:44] 27 of 27 linears: fp8_backend sm90; fell back: none\nother\n"
    )
    lines = selection_lines(log_text)
    assert len(lines) == 2 and names_ours(lines) and names_fp8_kernel(lines)
    assert not names_ours(lines[:1]) and not names_fp8_kernel(lines[1:])


def test_mean_kl() -> None:
    half, quarter = log(0.5), log(0.25)
    full = [{"1": half, "2": half}]
    assert report.mean_kl(full, full) == 0
    assert report.mean_kl(full, [{"1": quarter, "2": log(0.75)}]) == pytest.approx(0.5 * log(4 / 3))
    # Token 2 is known to one arm alone: what is left over counts as one token, here the same distributions.
    assert report.mean_kl(full, [{"1": quarter, "3": log(0.7)}]) == pytest.approx(0.5 * log(4 / 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1,x"], "--batches 1,x: expected numbers above 0"),
        (["--prefill", "2048"], "--prefill 2048: expected batch x tokens"),
        (["--output-len", "1"], "--output-len must be at least 2"),
        (["--prefill", "1x100000"], "100001 tokens of a sequence"),
    ],
)
def test_refusals(
    options: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ab", str(checkpoint), "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_refuses_what_is_not_an_fp8_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ab", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    assert cli.main(["ab", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "not an FP8 checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("stock", [True, False])
def test_arms(stock: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "stock_fp8_runs", lambda: stock)
    found = setup.prepare(checkpoint, None, tmp_path)
    request = command.request_for(_arguments(checkpoint), found)
    default, ours = (setup.engine_arguments(found, arm, request) for arm in ("default", "ours"))
    differ = {key for key in ours if ours[key] != default.get(key)}
    assert differ == ({"quantization"} if stock else {"quantization", "model"})
    assert found.default_is_fp8 is stock and ours["load_format"] == "auto"
    if not stock:
        config = json.loads((Path(default["model"]) / "config.json").read_text())
        assert "quantization_config" not in config and "bf16 twin" in found.default_text


@pytest.mark.parametrize("stock", [True, False])
def test_a_config_alone_gets_dummy_weights_and_no_kl(
    stock: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "stock_fp8_runs", lambda: stock)
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    found = setup.prepare(tmp_path, None, tmp_path / "scratch")
    request = command.request_for(_arguments(tmp_path), found)
    assert request.scored == []
    assert setup.engine_arguments(found, "ours", request)["load_format"] == "dummy"
    default = json.loads((found.default_model / "config.json").read_text())
    assert ("quantization_config" in default) is stock


def test_page_and_chart(tmp_path: Path) -> None:
    result = {
        "env": {"gpu": None, "cpus": 2, "command": "fp8-backend ab m"},
        "model": "m",
        "default": "vLLM's own FP8 path",
        "weights": "dummy",
        "order": "default ours ours default",
        "kl": "not measured",
        "rows": report.rows("m", RUNS, None),
        "runs": RUNS,
    }
    page = report.markdown(result)
    assert "CPU, 2 cores: shows that it works" in page
    assert page.count("12 of 12 linears: fp8_backend sm90") == 2 and page.count("Selected DeepGemm") == 2
    assert "| TPOT, batch 1 (ms) | 4.05 | 3.05 | 1.328 | ours 1.33x better |" in page
    assert "Of a run: tokens the first quartile of its answers, prefills the median." in page
    from fp8_backend.ab.chart import chart

    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(UnsupportedError, match="matplotlib is not installed"):
            chart(result, tmp_path / "chart.png")
        return
    chart(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def _arguments(model: Path) -> command.argparse.Namespace:
    parser = command.argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(
        [str(model), "--batches", "1", "--prefill", "1x64", "--input-len", "8", "--output-len", "3"]
    )


@pytest.mark.vllm
def test_one_run_of_ours(checkpoint: Path, tmp_path: Path) -> None:
    found = setup.prepare(checkpoint, None, tmp_path / "scratch")
    request = command.request_for(_arguments(checkpoint), found)
    caches = tmp_path / "caches"
    done = command.run_arm("ours", 1, found, request, tmp_path, 300, setup.Conditions(caches=caches))
    assert done["failure"] is None and done["start_up"] == "start-up with kept caches"
    assert any(caches.iterdir()), "nothing was kept"
    answer = done["answer"]
    assert answer["tpot_ms"]["1"] > 0 and answer["prefill_ms"]["1x64"] > 0 and answer["start_up_s"] > 0
    assert set(answer["steps"]) == set(answer["samples_s"]) and answer["steps"]["1 x 64 + 1"][0] == 1
    assert list(answer["tokens_ms"]) == ["1 x 8 + 3"]
    assert min(answer["tokens_ms"]["1 x 8 + 3"]) <= answer["tpot_ms"]["1"] <= max(answer["tokens_ms"]["1 x 8 + 3"])
    assert answer["peak_bytes"] > 2**27 and names_ours(done["selection"])
    rows = torch.tensor([list(row.values()) for row in answer["distributions"]], dtype=torch.float64)
    assert rows.shape == (190, 1024)
    torch.testing.assert_close(rows.exp().sum(dim=1), torch.ones(190, dtype=torch.float64), rtol=0, atol=1e-3)


def test_kept_caches_hold_a_named_model_and_the_page_names_all_conditions(tmp_path: Path) -> None:
    caches, out = tmp_path / "caches", tmp_path / "out"
    call = ["ab", "qwen3-8b", "--caches", str(caches), "--out", str(out), "--deadline", "1e-9"]
    assert cli.main(call) == 1
    page = (out / "report.md").read_text()
    assert "start-up with kept caches (s)" in page and "Routing: experts as the model's routers choose." in page
    assert cli.main([*call, "--even-routing", "--skip-deepgemm-warmup"]) == 1  # as well where the model is there
    page = (out / "report.md").read_text()
    assert "start-up with kept caches without DeepGEMM's warm-up (s)" in page
    assert "Routing: experts drawn at random, evenly." in page and "not measured: experts are drawn anew" in page
    assert (caches / "qwen3-8b" / "config.json").is_file()


def test_a_recorded_result_is_reported_into_a_new_folder(tmp_path: Path) -> None:
    recorded = Path(__file__).parents[1] / "benchmarks" / "results" / "h100" / "e2e-qwen3-8b.json"
    assert cli.main(["ab", "--from", str(recorded), "--out", str(tmp_path / "new" / "report")]) == 0
    page = (tmp_path / "new" / "report" / "report.md").read_text()
    assert "| TPOT, batch 1 (ms) | 4.599 | 3.956 | 1.162 | ours 1.16x better |" in page
    assert "Of a run: tokens the median of its answers, prefills the median." in page  # as they were taken then


@pytest.mark.parametrize("name", CONFIGS)
def test_models_by_name_are_configs_we_serve(name: str, tmp_path: Path) -> None:
    folder = find_model(Path(name), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert folder.name == name and read_format(config).method == "fp8"
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(config["num_hidden_layers"])]
    if config["model_type"] == "qwen3_moe":
        assert set(routers) <= set(config["quantization_config"]["modules_to_not_convert"])


def test_a_folder_goes_before_a_name(checkpoint: Path, tmp_path: Path) -> None:
    assert find_model(checkpoint, tmp_path) == checkpoint
    with pytest.raises(CheckpointError, match="nowhere: no folder; .* qwen3-8b, qwen3-32b, qwen3-30b-a3b, .*"):
        find_model(Path("nowhere"), tmp_path)
