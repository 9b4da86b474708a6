"""Checks the plugin against the CUDA wheels of several vLLM versions, without a GPU.

Usage: python tests/compat_probe.py [folder of wheels, .venv-compat by default]

Each wheel is downloaded once, unpacked, and put before this environment's own vLLM in a process of its own: the wheel's
Python code runs with this environment's torch and transformers. The process registers the plugin twice, resolves a
checkpoint's config as `vllm serve --quantization deepgemm_fp8` does, and looks for abstract methods left to us.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("0.26.0", "0.32.0", "0.33.0")
ROOT = Path(__file__).resolve().parent.parent
# CUDA wheels of vLLM exist for one Python ABI range and platform; pip must not reject them on another machine.
PIP = "download --quiet --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64".split()


def unpack(version: str, folder: Path) -> Path:
    """Return the folder that holds one version's packages, downloading the wheel at the first time."""
    target = folder / version
    if (target / "complete").exists():
        return target
    wheels = folder / "wheels"
    found = sorted(wheels.glob(f"vllm-{version}-*.whl"))
    if not found:
        # The pip of the Python that made this environment, which has none of its own (demo/install.py).
        pip = [sys._base_executable, "-m", "pip"]
        subprocess.run([*pip, *PIP, "-d", str(wheels), f"vllm=={version}"], check=True)
        found = sorted(wheels.glob(f"vllm-{version}-*.whl"))
    with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(target)
    (target / "complete").touch()
    return target


def check(version: str) -> None:
    """Run inside the process whose first path entry is an unpacked wheel."""
    sys.path.insert(0, str(ROOT))
    import torch
    import vllm

    assert version in vllm.__version__, f"imported vLLM {vllm.__version__} instead of {version}"
    from vllm.config import LoadConfig, ModelConfig, VllmConfig
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    from fp8_backend.integration import plugin

    plugin.register()
    plugin.register()
    assert QUANTIZATION_METHODS.count(plugin.NAME) == 1
    with tempfile.TemporaryDirectory() as folder:
        from demo.architectures import SIZES, model_config
        from demo.tokenizer import write_tokenizer

        config = model_config("qwen3", SIZES["qwen3", "demo"])
        Path(folder, "config.json").write_text(json.dumps(config))
        write_tokenizer(Path(folder), SIZES["qwen3", "demo"].vocab, 256)
        plain = ModelConfig(model=folder)
        assert plain.quantization == "fp8", plain.quantization
        chosen = ModelConfig(model=folder, quantization=plugin.NAME)
        assert chosen.quantization == plugin.NAME
        resolved = VllmConfig._get_quantization_config(chosen, LoadConfig())
    assert type(resolved) is plugin.config_class()
    assert resolved.weight_block_size == [128, 128]

    from fp8_backend.integration.experts import DeepGemmFp8BatchedExperts, DeepGemmFp8Experts
    from fp8_backend.integration.linear import DeepGemmFp8LinearMethod
    from fp8_backend.integration.moe import DeepGemmFp8MoEMethod

    experts = (DeepGemmFp8Experts, DeepGemmFp8BatchedExperts)
    for method in (type(resolved), DeepGemmFp8LinearMethod, DeepGemmFp8MoEMethod, *experts):
        assert not method.__abstractmethods__, f"{method.__name__} lacks {sorted(method.__abstractmethods__)}"
    # Names that are vLLM's own business, without which no weight reload is watched.
    from vllm.model_executor.model_loader.reload import layerwise

    from fp8_backend.integration import compat

    assert callable(layerwise._place_kernel_tensors) and not compat.is_reloading()
    compat.undo_reload()
    assert compat.names_are_inputs()
    check_cache()
    x = torch.zeros(3, 256, dtype=torch.bfloat16, device="meta")
    weight = torch.zeros(2, 128, 128, dtype=torch.float8_e4m3fn, device="meta")
    y = torch.ops.fp8_backend.linear(x, weight, torch.zeros(1, 4, device="meta"), None, 128)
    assert tuple(y.shape) == (3, 128)
    assert not torch.cuda.is_initialized()
    print(f"vLLM {vllm.__version__}: registers, resolves, no abstract method left, no CUDA touched")


def check_cache() -> None:
    """Check that FlashAttention writes keys and values where `compat.keys_and_values` says."""
    from types import SimpleNamespace

    import torch
    from vllm.v1.attention.backends import flash_attn

    from fp8_backend.integration import compat

    impl = flash_attn.FlashAttentionImpl.__new__(flash_attn.FlashAttentionImpl)
    impl.head_size, impl.attn_type, impl.kv_cache_dtype = 64, "decoder", "auto"
    layer = SimpleNamespace(impl=impl, _k_scale=None, _v_scale=None)
    cache, written = torch.zeros(4, 2, 16, 128), []
    flash_attn.reshape_and_cache_flash = lambda *given: written.extend(given[2:4])
    impl.do_kv_cache_update(layer, None, None, cache, None)
    halves = compat.keys_and_values(layer, cache)
    assert halves is not None and halves[0].shape == (4, 16, 2, 64)
    for half, theirs in zip(halves, written, strict=True):
        assert (half.data_ptr(), half.shape, half.stride()) == (theirs.data_ptr(), theirs.shape, theirs.stride())


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--check":
        check(sys.argv[2])
        return 0
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".venv-compat").resolve()
    failed = []
    for version in VERSIONS:
        path = os.pathsep.join([str(unpack(version, folder)), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_PLUGINS": ""}
        command = [sys.executable, str(Path(__file__).resolve()), "--check", version]
        if subprocess.run(command, env=environment, cwd=folder).returncode:
            failed.append(version)
    if failed:
        print(f"failed with vLLM {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
