"""Every `FP8_BACKEND_*` environment variable; nothing else in the package reads the environment.

python -m fp8_backend.settings > docs/settings.md
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fp8_backend.errors import CacheError, SettingsError

PREFIX = "FP8_BACKEND_"


class Settings(BaseModel):
    """What a user can set, each as FP8_BACKEND_<FIELD NAME IN CAPITALS>."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strict: bool = Field(
        default=False,
        description="`1`: refuse to start where a layer or GPU cannot use these kernels. `0`: vLLM's own FP8 path "
        "serves there, and the log says so.",
    )
    kernels: Literal["auto", "reference"] = Field(
        default="auto",
        description="`auto`: the CUDA kernels on a Hopper GPU, plain PyTorch on a CPU. `reference`: plain PyTorch "
        "everywhere, slowly, to tell a kernel's fault from another.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="An absolute path: where compiled kernels are kept. By default `fp8_backend` in `VLLM_CACHE_ROOT`, "
        "else in `XDG_CACHE_HOME`, else in `~/.cache`.",
    )
    jit: Literal["auto", "forbid"] = Field(
        default="auto",
        description="`forbid`: a kernel that is not in the cache is an error at start-up. `auto`: it is compiled then.",
    )
    batch_invariant: bool = Field(
        default=False,
        description="`1`: the CUDA kernels give a token the same bits in a batch of any size; some sizes are slower. "
        "`0`: the fastest kernel for each size. vLLM's `VLLM_BATCH_INVARIANT=1` asks for it, too.",
    )

    fuse: bool = Field(
        default=True,
        description="`1`: where vLLM compiles a model, RMSNorm and SiLU-and-multiply before a linear write the FP8 "
        "codes that it multiplies, and norm and rotation of queries and keys are one kernel. `0`: every linear "
        "quantises by itself, mostly in one more launch, and the rest is vLLM's.",
    )

    attention: bool = Field(
        default=True,
        description="`1`: where vLLM's FlashAttention serves a layer without windows or biases, heads of 128 elements, "
        "at most 8 of queries for one of keys, and a 16-bit cache, decode steps attend with a kernel of this package. "
        "`0`: with vLLM's.",
    )

    @field_validator("strict", "batch_invariant", "fuse", "attention", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, str) and value not in ("0", "1"):  # pydantic alone would take "on", "T" and more
            raise ValueError("must be 0 or 1")
        return value

    @field_validator("cache_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        try:
            value = value.expanduser()
        except RuntimeError as error:
            raise ValueError(f"names the home of a user who has none ({error})") from None
        if not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value

    def resolved_cache_dir(self, environ: Mapping[str, str] = os.environ) -> Path:
        """Return the directory of compiled kernels, an absolute path; it need not exist.

        Raises:
            CacheError: it would be in the home directory of a user who has none.
        """
        if self.cache_dir is not None:
            return self.cache_dir
        source = self.cache_dir_source(environ)
        root = "~/.cache" if source == "default" else environ[source]
        try:
            # As vLLM takes its own: relative to where the process runs.
            return Path(root).expanduser().absolute() / "fp8_backend"
        except RuntimeError:  # what pathlib raises for a user id without an entry, and for ~name
            where = "" if source == "default" else f" for {source}={root!r}"
            raise CacheError(f"there is no home directory{where} to keep kernels in; set {PREFIX}CACHE_DIR") from None

    def resolved_batch_invariant(self, environ: Mapping[str, str] = os.environ) -> bool:
        """Return whether this setting or vLLM's asks for rows that do not depend on their batch."""
        return self.batch_invariant or environ.get("VLLM_BATCH_INVARIANT", "0") == "1"

    def cache_dir_source(self, environ: Mapping[str, str] = os.environ) -> str:
        """Return the variable that decides `resolved_cache_dir`, or "default"."""
        if self.cache_dir is not None:
            return PREFIX + "CACHE_DIR"
        return next((name for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME") if environ.get(name)), "default")


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings in force.

    Raises:
        SettingsError: an `FP8_BACKEND_*` variable does not exist or cannot take its value; names both and the choice.
    """
    given = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    known = {PREFIX + field.upper(): field for field in Settings.model_fields}
    if unknown := sorted(set(given) - set(known)):
        raise SettingsError(
            f"{unknown[0]}={given[unknown[0]]!r} is not a setting; settings: {', '.join(sorted(known))}; unset it"
        )
    try:
        return Settings.model_validate({known[name]: value for name, value in given.items()})
    except ValidationError as error:
        detail = error.errors()[0]
        name = PREFIX + str(detail["loc"][0]).upper()
        said = detail["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{name}={given[name]!r}: {said}; correct it or unset it") from None


def value_or_none(field: str) -> object:
    """Return a setting's value, or None while the environment holds one that `load` refuses."""
    try:
        return getattr(load(), field)
    except SettingsError:
        return None


def vllm_plugins(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the names in vLLM's allow-list of plugins, or None if it loads all."""
    return environ["VLLM_PLUGINS"].split(",") if "VLLM_PLUGINS" in environ else None


def table() -> str:
    """Return the settings as a Markdown table: variable, values with the default first, meaning."""
    rows = ["| variable | values | meaning |", "|---|---|---|"]
    for field, info in Settings.model_fields.items():
        choices = ("01" if not info.default else "10") if info.annotation is bool else get_args(info.annotation)
        values = ", ".join(f"`{choice}`" for choice in choices if isinstance(choice, str)) or "a path"
        rows.append(f"| `{PREFIX}{field.upper()}` | {values} | {info.description} |")
    return "\n".join(rows)


def page() -> str:
    """Return docs/settings.md."""
    return f"""# Settings

<!-- Written by `python -m fp8_backend.settings`; change fp8_backend/settings.py instead. -->

Every setting is an environment variable. The first value is the default.

{table()}

A variable that starts with `{PREFIX}` and is not in this table, or has a value that is not listed, is an error at
start-up: a misspelt setting is never ignored. `fp8-backend doctor` shows each setting in force and where it comes from.

All but the place of the cache are part of the key of vLLM's torch.compile cache: after a change vLLM compiles the model
anew instead of loading a graph that was made under another setting. Moving the cache costs nothing.

vLLM's own variables that matter here: `VLLM_PLUGINS`, if set, must contain `fp8_backend`; `VLLM_LOGGING_LEVEL=DEBUG`
makes each process that ends by itself say how many calls, fallbacks and compiles it counted.
"""


if __name__ == "__main__":
    print(page(), end="")
