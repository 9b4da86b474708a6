"""The entry point vLLM calls in each of its processes."""

from __future__ import annotations

import logging

from fp8_backend import settings

NAME = "deepgemm_fp8"
# Kernels' settings that can change a compiled graph; cache_dir cannot, and would void vLLM's compile cache when moved.
COMPILE_KEY_FIELDS = ("strict", "kernels", "jit")

logger = logging.getLogger("vllm.fp8_backend.integration.plugin")


def register() -> None:
    """Make `--quantization deepgemm_fp8` known to vLLM; calling it again changes nothing.

    It neither reads the user's settings nor touches CUDA, so that a vLLM started without the flag is left as it was. A vLLM
    whose classes have moved leaves the method unregistered with a warning instead of stopping servers that do not use it.
    """
    from vllm.model_executor.layers import quantization

    _register_settings()
    if NAME in quantization.QUANTIZATION_METHODS:
        return
    try:
        from fp8_backend.integration.config import DeepGemmFp8Config
    except (ImportError, AttributeError, TypeError) as error:
        import vllm

        logger.warning("--quantization %s is not available: it does not fit vLLM %s (%s)", NAME, vllm.__version__, error)
        return
    quantization.register_quantization_config(NAME)(DeepGemmFp8Config)


def _register_settings() -> None:
    """Let the settings take part in the key of vLLM's torch.compile cache."""
    from vllm import envs

    for field in COMPILE_KEY_FIELDS:
        name = settings.PREFIX + field.upper()
        envs.environment_variables.setdefault(name, lambda field=field: settings.value_or_none(field))
