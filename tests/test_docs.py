"""Every command in README.md and docs/ is run; what needs a GPU, a server or minutes is parsed by its own parser.

A command is a line of a fenced `sh` block, or of an indented block that starts with a program known here. A program, an
argument or a kind of block that nobody has taken care of fails the test. Commands and paths within a sentence are
looked up, quotations of messages are searched in the sources that print them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from demo.architectures import SIZES
from demo.checkpoint import dequantize_checkpoint, write_checkpoint
from fp8_backend import settings
from fp8_backend.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("make", "pip", "vllm", "fp8-backend", "python", ".venv/bin/python", ".venv/bin/pre-commit", "export")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
SENTENCE = re.compile(r"`((?:fp8-backend|make) [^`]+)`")
FILE = re.compile(r"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|md|json|cuh))?)`")
# Runs a program with the arguments given, up to the moment at which its parser has accepted them.
PARSE = """
import argparse, runpy, sys
parse = argparse.ArgumentParser.parse_args
def accept(*arguments, **named):
    parse(*arguments, **named)
    print("ACCEPTED")
    sys.exit(0)
argparse.ArgumentParser.parse_args = accept
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__")
"""
# These run for real. The others measure on a GPU, or serve until they are stopped.
RUN = {"doctor", "cache", "inspect", "quantize", "dequantize"}


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        text = page.read_text()
        blocks = [body for language, body in FENCE.findall(text) if language == "sh"]
        for block in INDENTED.findall(FENCE.sub("", text)):
            if block.split()[0] in PROGRAMS:
                blocks.append(block)
        for block in blocks:
            for line in block.splitlines():
                if line.strip():
                    yield str(page.relative_to(ROOT)), line.strip()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Real files for the names that stand for files of the reader: MODEL is FP8, SRC is bf16 for quantize."""
    folder = tmp_path_factory.mktemp("docs")
    write_checkpoint(folder / "fp8", "qwen3", replace(SIZES["qwen3", "demo"], layers=2))
    dequantize_checkpoint(folder / "fp8", folder / "bf16")
    return {"MODEL": str(folder / "fp8"), "SRC": str(folder / "bf16"), "FP8": str(folder / "fp8")}


def environment(assignments: list[str], cache: Path) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FP8_BACKEND_")}
    given = dict(assignment.split("=", 1) for assignment in assignments)
    settings.load(given)  # a page must not name a setting that does not exist
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return {**environ, **given, "PYTHONPATH": path, "FP8_BACKEND_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}


def accepted(module: str, arguments: list[str], environ: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARSE, module, *arguments], capture_output=True, text=True, timeout=120, env=environ
    )
    # --help is answered before the parser returns.
    assert done.returncode == 0 and ("ACCEPTED" in done.stdout or "--help" in arguments), done.stderr[-2000:]


def our_command(arguments: list[str], environ: dict[str, str], places: dict[str, str], folder: Path) -> None:
    if arguments[0] not in RUN:
        accepted("fp8_backend.cli", arguments, environ)
        return
    source = places["FP8"] if arguments[0] == "dequantize" else places["SRC"]
    names = {**places, "SRC": source, "OUT": str(folder / "out"), "8": "2"}  # the small model splits over two ranks
    command = [sys.executable, "-m", "fp8_backend.cli", *(names.get(argument, argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, cwd=folder)
    # The doctor may find something to do on the machine of the tests; that it says so is what is documented.
    assert done.returncode == 0 or (arguments == ["doctor"] and done.returncode == 1), done.stdout + done.stderr


def pip_command(arguments: list[str]) -> None:
    """Installing is what tests/test_package.py does; here, that a page asks for what exists."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    action, what = arguments
    name, _, extra = what.partition("[")
    assert (action, name) in (("install", "."), ("install", project["name"]), ("uninstall", project["name"]))
    assert not extra or extra.removesuffix("]") in project["optional-dependencies"]


@pytest.mark.parametrize(("line", "page"), {line: page for page, line in commands()}.items())
def test_command(page: str, line: str, places: dict[str, str], tmp_path: Path, warm_cache: Path) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "export":
        environment(words[1:], warm_cache)
        return
    given = [word for word in words if re.match(r"[A-Z_0-9]+=", word)]
    program, *arguments = [word for word in words if word not in given]
    environ = environment(given, warm_cache)
    match program:
        case "make":
            subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
        case "pip":
            pip_command(arguments)
        case "fp8-backend":
            our_command(arguments, environ, places, tmp_path)
        case "vllm":
            pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")
            accepted("vllm.entrypoints.cli.main", [places.get(word, word) for word in arguments], environ)
        case "python" | ".venv/bin/python" if arguments[:2] == ["-m", "pytest"]:
            assert arguments[2].startswith("tests/") and (ROOT / arguments[2]).exists()
        case "python" | ".venv/bin/python" if arguments == ["-m", "build"]:
            pass  # run by tests/test_package.py
        case "python" | ".venv/bin/python" if arguments[0] == "-m":
            accepted(arguments[1], arguments[2:], environ)
        case ".venv/bin/pre-commit":
            assert arguments == ["install"] and (ROOT / ".pre-commit-config.yaml").exists()
        case _:
            pytest.fail(f"{page}: nobody runs or parses {line!r}; teach this test to")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_of_a_kind_that_is_run(page: Path, tmp_path: Path) -> None:
    for language, body in FENCE.findall(page.read_text()):
        assert language in ("sh", "python", "text"), f"nobody runs a block of {language or 'no language'}"
        if language == "python":
            environ = environment([], tmp_path / "cache")
            done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, env=environ)
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist(page: Path) -> None:
    for command in SENTENCE.findall(page.read_text()):
        program, name, *arguments = shlex.split(command)
        if program == "make":
            subprocess.run(["make", "-n", name, *arguments], cwd=ROOT, check=True, capture_output=True)
            continue
        parser = argparse.ArgumentParser(name)
        importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
        text = parser.format_help()
        actions = [argument for argument in arguments if re.fullmatch(r"--[a-z-]+|[a-z]+", argument)]
        assert all(re.search(rf"(?<![\w-]){action}\b", text) for action in actions), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_within_sentences_exist(page: Path) -> None:
    for name in FILE.findall(page.read_text()):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "fp8_backend", page.parent)), name


def test_times_of_the_kernels_page_are_in_the_notes() -> None:
    """The page gives the notes' figures without their circumstances; it must not have figures of its own."""
    notes = "\n".join(path.read_text() for path in (ROOT / "docs").glob("kernel-notes*.md"))
    rows = re.findall(
        r"^\| step .*before, us.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "docs" / "kernels.md").read_text(), re.M
    )
    times = [cell.strip() for table in rows for row in table.splitlines() for cell in row.split("|")[3:5]]
    assert len(times) >= 20
    for time in times:
        assert re.search(rf"(?<![\d.]){re.escape(time)}(?![\d]|\.\d)", notes), time


def test_the_table_of_linears_is_that_of_the_result() -> None:
    from fp8_backend.bench import peers, report, shapes

    rows = json.loads((ROOT / "benchmarks" / "results" / "h200" / "dense.json").read_text())["rows"]
    table = re.findall(r"^\| (\d+) to (\d+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(table) == len(shapes.REGIMES)
    for (first, last, cells), regime in zip(table, shapes.REGIMES, strict=True):
        assert (int(first), int(last)) == (regime.ms[0], regime.ms[-1])
        found = [row for row in rows if "stream_us" in row and row["m"] in regime.ms]
        expected = [str(len(found)), f"{report.geomean(report.ratio(row, peers.FP8_NAMES) for row in found):.2f}"]
        for name in peers.NAMES:
            each = [row["peers"][name] / row["us"] for row in found if name in row["peers"]]
            ran = len(each) > len(found) / 2
            expected.append(f"{report.geomean(each):.2f}" if ran else "-")
        assert cells.split(" | ") == [*expected, str(len(report.lost_cells(found)))]


def test_the_table_of_experts_is_that_of_the_result() -> None:
    from fp8_backend.bench import moe_shapes, report

    rows = json.loads((ROOT / "benchmarks" / "results" / "h200" / "moe.json").read_text())["rows"]
    assert all(row["verified"] for row in rows)
    table = re.findall(r"^\| (\d+) to (\d+) tokens \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(table) == len(moe_shapes.REGIMES)
    for (first, last, cells), regime in zip(table, moe_shapes.REGIMES, strict=True):
        assert (int(first), int(last)) == (regime.tokens[0], regime.tokens[-1])
        found = [row for row in rows if row.get("tokens") in regime.tokens]
        best = [min(row["peers"].values()) / row["us"] for row in found]
        means = [best, *([row["peers"][name] / row["us"] for row in found] for name in ("triton", "deepgemm"))]
        expected = [str(len(found)), *(f"{report.geomean(mean):.2f}" for mean in means)]
        assert cells.split(" | ") == [*expected, str(sum(ratio < 1 for ratio in best))]


def test_the_table_of_models_is_that_of_the_results() -> None:
    files = {path.relative_to(ROOT) for path in (ROOT / "benchmarks" / "results").glob("*/e2e-*.json")}
    row = r"^\| .*, (H\d00),.* ([0-9a-f]{7}) \| (.*) \| `(.*/e2e-.*\.json)` \|$"
    table = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert {Path(name) for *_, name in table} == files
    for gpu, commit, cells, name in table:
        result = json.loads((ROOT / name).read_text())
        assert gpu in result["env"]["gpu"]["name"] and commit == result["env"]["commit"]
        rows = [row for row in result["rows"] if "batch" in row or "prefill" in row]
        doubts = [", inconclusive" if "inconclusive" in row["verdict"] else "" for row in rows]
        assert cells.split(" | ") == [f"{row['ratio']:.2f}{doubt}" for row, doubt in zip(rows, doubts, strict=True)]


def sources(folder: Path) -> str:
    """Return the Python files of a folder with each text in one piece, however it is broken into lines."""
    text = "\n".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def quotations() -> list[str]:
    """Return what the bold headings of troubleshooting.md quote."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    headings = re.findall(r"^\*\*(.+?)\*\*", text, re.MULTILINE | re.DOTALL)
    return [" ".join(quoted.split()) for heading in headings for quoted in re.findall(r'"([^"]+)"', heading)]


@pytest.mark.parametrize("quotation", quotations())
def test_quoted_messages_are_those_that_are_printed(quotation: str) -> None:
    if "quantization method specified" in quotation.lower():
        config = pytest.importorskip("vllm.config.model", reason="needs vLLM; vllm is not installed")
        text = sources(Path(config.__file__).parent)
    else:
        text = sources(ROOT / "fp8_backend")
    for part in re.split(r"\.\.\.|^N |\(\w+\)|`\w+`", quotation):  # what stands for a name or a number
        assert part.strip(" .()") in text, part


def test_messages_in_the_checkpoint_guide_are_those_that_are_printed() -> None:
    text = sources(ROOT / "fp8_backend")
    rows = (ROOT / "docs" / "checkpoints.md").read_text().partition("## Errors")[2].splitlines()
    messages = [
        message for row in rows if row.startswith("| `") for message in re.findall(r"`(.+?)`", row.split("|")[1])
    ]
    assert len(messages) > 10
    for part in (part for message in messages for part in re.split(r"\.\.\.(?:_scale_inv)?|is nan(?= \()", message)):
        assert part in text, part


def test_every_page_with_commands_was_read() -> None:
    assert {page for page, _ in commands()} >= {"README.md", "docs/serving.md", "docs/ab.md", "docs/contributing.md"}


def test_settings_page_is_what_the_settings_say() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings.page(), "python -m fp8_backend.settings"


def test_every_setting_is_in_the_table_with_its_default_first() -> None:
    rows = [line for line in settings.table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(settings.Settings.model_fields)
    for row in rows:
        name, value = re.match(r"\| `(\w+)` \| (?:`(\w+)`|a path)", row).groups()  # type: ignore[union-attr]
        assert value is None or settings.load({name: value}) == settings.Settings.model_construct(
            **{**settings.Settings().model_dump()}
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_named_on_a_page_exist(page: Path) -> None:
    known = {settings.PREFIX + field.upper() for field in settings.Settings.model_fields}
    assert set(re.findall(r"FP8_BACKEND_[A-Z_]+[A-Z]", page.read_text())) <= known


def test_changelog_starts_with_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None and heading[1] == version
