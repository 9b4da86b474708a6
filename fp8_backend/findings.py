"""What a probe of this machine found, and the guard that makes its failure one more thing found."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from fp8_backend.errors import Fp8BackendError, SettingsError

HOPPER, OTHER_GPU, CPU = "Hopper GPU", "other GPU", "CPU"


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and what to do; no action means that it is fine."""

    what: str
    found: str
    action: str = ""
    examined: bool = True

    @property
    def ok(self) -> bool | None:
        """Whether it is fine; None if it could not be examined for a reason that another finding gives."""
        return not self.action if self.examined else None


Look = Callable[[], Finding | list[Finding]]


def guarded(what: str, probe: Look, action: str) -> list[Finding]:
    """Return what a probe finds; if it fails, the failure and `action`."""
    try:
        found = probe()
    except SettingsError:  # the settings have a line of their own, which says what to do
        return [Finding(what, "not examined: the settings cannot be read", examined=False)]
    except Fp8BackendError as error:
        return [Finding(what, str(error), action)]
    except (Exception, SystemExit) as error:  # whatever is broken here is what the user wants to know
        return [Finding(what, f"{type(error).__name__}: {error}", action)]
    return found if isinstance(found, list) else [found]


@cache
def nvidia_smi(*fields: str) -> list[dict[str, str]]:
    """Return the fields of each GPU as nvidia-smi prints them, or [] where it does not run.

    It is asked beside torch because it answers where torch does not, and because a driver that hangs hangs a child.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = (line.split(", ") for line in done.stdout.strip().splitlines())
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]
