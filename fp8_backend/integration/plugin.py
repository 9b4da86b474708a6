"""The entry point vLLM calls in each of its processes."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8_backend import settings
from fp8_backend.errors import UnsupportedError

if TYPE_CHECKING:
    from fp8_backend.integration.config import DeepGemmFp8Config

NAME = "deepgemm_fp8"
# Settings that can change a compiled graph. cache_dir cannot: moving it must not void vLLM's compile cache.
COMPILE_KEY_FIELDS = ("strict", "kernels", "jit", "batch_invariant", "fuse")


def register() -> None:
    """Make `--quantization deepgemm_fp8` known to vLLM; calling it again changes nothing.

    It imports none of vLLM's layers, reads no setting and touches no CUDA: without the flag vLLM is left as it was.
    """
    from vllm import envs
    from vllm.model_executor.layers import quantization

    for field in COMPILE_KEY_FIELDS:
        # vLLM hashes every variable it knows into the key of its torch.compile cache.
        name = settings.PREFIX + field.upper()
        envs.environment_variables.setdefault(name, lambda field=field: settings.value_or_none(field))
    # A compiled graph calls our ops by name, where our pass put them: one made with others must not be loaded.
    envs.environment_variables.setdefault("FP8_BACKEND_OPS", lambda: ops_version())
    if NAME not in quantization.QUANTIZATION_METHODS:
        quantization.register_quantization_config(NAME)(_registration())


@functools.cache
def ops_version() -> str:
    """Return what tells torch ops and compile pass of this installation from those of another: a digest of them."""
    names = ("ops.py", "fusion.py", "fusion_heads.py")
    sources = (Path(__file__).with_name(name).read_bytes() for name in names)
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def config_class() -> type[DeepGemmFp8Config]:
    """Import the config proper.

    Raises:
        UnsupportedError: this vLLM's classes are not where the package expects them.
    """
    try:
        from fp8_backend.integration.config import DeepGemmFp8Config
    except (ImportError, AttributeError, TypeError) as error:
        import vllm

        from fp8_backend.integration import compat

        message = f"vLLM {vllm.__version__} lacks what fp8_backend builds on ({error}); install {compat.TESTED}"
        raise UnsupportedError(message) from error
    return DeepGemmFp8Config


def _registration() -> type:
    """Return the class vLLM finds under our name.

    Importing vLLM's Fp8Config costs 1.1 s (900 modules), in every process and for every model. This class stands for
    ours until the user's flag is seen, and makes the config proper wherever vLLM would make an instance.
    """
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class DeepGemmFp8Registration(QuantizationConfig):
        def __new__(cls, *arguments: Any, **named: Any) -> DeepGemmFp8Config:
            return config_class()(*arguments, **named)

        @classmethod
        def get_name(cls) -> str:
            return NAME

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> DeepGemmFp8Config:
            return config_class().from_config(config)

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> str | None:
            """Claim every quantised checkpoint the user gave the flag for, and no other.

            vLLM asks for each model it starts. A checkpoint we cannot serve is claimed too: `from_config` refuses it
            with its reason, where vLLM would only say that two names do not match.
            """
            if user_quant != NAME:
                return None
            settings.load()
            return NAME

    return DeepGemmFp8Registration
