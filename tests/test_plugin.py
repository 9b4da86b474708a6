"""Registration, the choice of config, and refusals before an engine starts; through real vLLM, without an engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM; vllm is not installed")

import vllm.platforms
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

from demo.architectures import SIZES
from demo.checkpoint import dequantize_checkpoint, write_checkpoint
from fp8_backend.cli import main
from fp8_backend.errors import UnsupportedError
from fp8_backend.integration import config as config_module
from fp8_backend.integration import plugin
from fp8_backend.integration.config import DeepGemmFp8Config
from fp8_backend.integration.plugin import NAME, register

TINY = replace(SIZES["qwen3", "demo"], layers=1, hidden=256, heads=2, kv_heads=1, intermediate=256, vocab=512)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin") / "fp8"
    write_checkpoint(folder, "qwen3", TINY)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    config_module.select_backend.cache_clear()
    config_module._warn_once.cache_clear()
    yield
    config_module.select_backend.cache_clear()


def start(folder: Path, **arguments: Any) -> VllmConfig:
    return EngineArgs(model=str(folder), **{"quantization": NAME, **arguments}).create_engine_config()


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_register_is_idempotent_light_and_touches_no_cuda() -> None:
    script = (
        "import sys, vllm.engine.arg_utils, torch\n"
        "from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS\n"
        "from fp8_backend.integration.plugin import NAME, register\n"
        "before = len(sys.modules)\n"
        "register(); register()\n"
        "print(QUANTIZATION_METHODS.count(NAME), len(sys.modules) - before, torch.cuda.is_initialized())\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    count, imported, cuda = said.split()[-3:]
    # vLLM's Fp8Config would bring some 900 modules and 1.1 s into every process.
    assert (count, cuda) == ("1", "False") and int(imported) < 20


def test_entry_point_is_found_by_vllm() -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert NAME in QUANTIZATION_METHODS


def test_without_the_flag_nothing_changes(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8_BACKEND_NO_SUCH_THING", "1")
    register()
    plain = start(pristine, quantization=None)
    assert plain.model_config.quantization == "fp8"
    assert type(plain.quant_config) is Fp8Config
    dequantize_checkpoint(pristine, tmp_path / "bf16")
    assert start(tmp_path / "bf16", quantization=None).quant_config is None


def test_with_the_flag_our_config_is_chosen_and_files_are_checked(pristine: Path, caplog_vllm: list[str]) -> None:
    chosen = start(pristine)
    assert type(chosen.quant_config) is DeepGemmFp8Config
    assert chosen.quant_config.get_name() == NAME
    assert chosen.quant_config.ignored_layers == ["lm_head"]
    assert sum("checkpoint is complete" in line for line in caplog_vllm) == 1


def test_float16_is_supported(pristine: Path) -> None:
    assert start(pristine, dtype="float16").model_config.dtype == torch.float16


def test_settings_enter_the_compile_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    register()
    monkeypatch.setenv("FP8_BACKEND_CACHE_DIR", "/a")
    before = envs.compile_factors()
    assert "FP8_BACKEND_CACHE_DIR" not in before
    monkeypatch.setenv("FP8_BACKEND_KERNELS", "reference")
    assert (before["FP8_BACKEND_KERNELS"], envs.compile_factors()["FP8_BACKEND_KERNELS"]) == ("auto", "reference")


def test_toggles_and_upgrades_change_the_key_of_compiled_graphs(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is vLLM's own, of the graphs it stores and loads."""
    from vllm.compilation.caching import aot_compile_hash_factors

    config = start(pristine)

    def key() -> list[str]:
        return aot_compile_hash_factors(config)

    before = key()
    assert key() == before
    for name, value in (
        ("FP8_BACKEND_KERNELS", "reference"),
        ("FP8_BACKEND_STRICT", "1"),
        ("FP8_BACKEND_JIT", "forbid"),
        ("FP8_BACKEND_FUSE", "0"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert key() != before, name
    with monkeypatch.context() as changed:
        changed.setenv("FP8_BACKEND_CACHE_DIR", "/elsewhere")
        assert key() == before
        changed.setattr(plugin, "ops_version", lambda: "another")
        assert key() != before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.pop("weight_block_size"), ("weight_block_size", "[128, 128]", "one scale a tensor")),
        (lambda config: config.update(weight_block_size=[64, 128]), ("[64, 128]", "[128, 128]")),
        (lambda config: config.update(quant_method="gptq", bits=4), ("quant_method", "gptq", "fp8")),
        (lambda config: config.update(activation_scheme="static"), ("activation_scheme", "static", "dynamic")),
        (lambda config: config.update(store_dtype="mxfp4"), ("store_dtype", "mxfp4")),
    ],
    ids=["per-tensor", "block-64", "not-fp8", "static", "mxfp4"],
)
def test_config_that_cannot_be_served(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: tuple[str, ...]
) -> None:
    edit(folder, change)
    with pytest.raises(ValueError) as caught:
        start(folder)
    assert all(word in str(caught.value) for word in words)


def test_bf16_checkpoint_is_refused(pristine: Path, tmp_path: Path) -> None:
    dequantize_checkpoint(pristine, tmp_path / "bf16")
    with pytest.raises(ValueError, match="config.json has no quantization_config.*drop the flag"):
        start(tmp_path / "bf16")


def test_quantised_checkpoints_are_read_by_stock_vllm_as_well(pristine: Path, tmp_path: Path) -> None:
    dequantize_checkpoint(pristine, tmp_path / "bf16")
    for method in ("fp8", "compressed-tensors"):
        out = tmp_path / method
        assert main(["quantize", str(tmp_path / "bf16"), str(out), "--format", method, "--workers", "1"]) == 0
        stock, ours = start(out, quantization=None).quant_config, start(out).quant_config
        assert stock.get_name() == method and type(ours) is DeepGemmFp8Config
        assert ours.is_skipped("lm_head") and not ours.is_skipped("model.layers.0.mlp.down_proj")
        if method == "fp8":
            assert type(stock) is Fp8Config
            assert (stock.weight_block_size, stock.ignored_layers) == ([128, 128], ours.ignored_layers)
        else:
            # What stock vLLM reads of the scheme is what it looks at to choose its block-scaled FP8 method.
            (scheme,) = stock.target_scheme_map.values()
            assert (scheme["weights"].strategy, scheme["weights"].block_structure) == ("block", [128, 128])
            assert stock._is_fp8_w8a8(scheme["weights"], scheme["input_activations"])


def test_broken_files_are_refused_before_anything_is_loaded(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="absent, and the index places .* in it; fetch the missing shard"):
        start(folder)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FP8_BACKEND_NO_SUCH_THING", "1", ("is not a setting", "FP8_BACKEND_STRICT")),
        ("FP8_BACKEND_STRICT", "perhaps", ("FP8_BACKEND_STRICT='perhaps'", "must be 0 or 1")),
        ("FP8_BACKEND_KERNELS", "fast", ("FP8_BACKEND_KERNELS='fast'", "'auto' or 'reference'")),
    ],
)
def test_bad_settings_are_refused(
    pristine: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        start(pristine)
    assert all(word in str(caught.value) for word in words)


class Ada(type(vllm.platforms.current_platform)):
    """This machine's platform, except that it says it is a GPU we have no kernels for."""

    device_type = "cuda"

    @classmethod
    def is_cpu(cls) -> bool:
        return False

    @classmethod
    def is_cuda(cls) -> bool:
        return True

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> tuple[int, int]:
        return (8, 9)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA L40S"


def test_other_gpu_is_served_by_vllm_with_one_warning(
    pristine: Path, one_rank: VllmConfig, monkeypatch: pytest.MonkeyPatch, caplog_vllm: list[str]
) -> None:
    chosen = start(pristine)
    quant_config = chosen.quant_config
    monkeypatch.setattr(config_module, "current_platform", Ada())
    config_module.select_backend.cache_clear()
    with set_current_vllm_config(chosen):
        layer = ReplicatedLinear(128, 128, params_dtype=torch.bfloat16)
        methods = [quant_config.get_quant_method(layer, f"layers.{index}.up_proj") for index in range(3)]
        assert type(quant_config.get_quant_method(layer, "lm_head")) is UnquantizedLinearMethod
    assert all(type(method) is Fp8LinearMethod for method in methods)
    warnings = [line for line in caplog_vllm if "NVIDIA L40S" in line]
    assert len(warnings) == 1
    assert all(word in warnings[0] for word in ("8.9", "9.0", "Hopper", "vLLM's own FP8 path"))
    assert quant_config.summary.line("cuda").startswith(
        "0 of 3 linears: fp8_backend sm90; fell back: 3 linears to vLLM's"
    )


def test_other_gpu_is_refused_when_strict(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "current_platform", Ada())
    monkeypatch.setenv("FP8_BACKEND_STRICT", "1")
    with pytest.raises(UnsupportedError, match="NVIDIA L40S.*8.9.*9.0.*unset FP8_BACKEND_STRICT"):
        start(pristine)
