"""Put the parts of one measurement, run separately on the same commit, into one file.

python -m benchmarks.merge OUT PART...
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fp8_backend.measure.environment import write_json

MISSING = ("failures", "absent", "absent_peers", "missing_runs")  # entries of env, whichever a result has


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parts as one result: lists one after the other, other entries beside each other, every command kept.

    Raises:
        ValueError: the parts come from different commits or machines, so they are not one measurement.
    """
    versions = {name: version for part in parts for name, version in part["env"]["versions"].items()}
    for key, of_part in (
        ("commit", [part["env"]["commit"] for part in parts]),
        # A part that has no use for a peer may run without it.
        *((name, [part["env"]["versions"].get(name, versions[name]) for part in parts]) for name in versions),
        ("GPU", [(part["env"].get("gpu") or {}).get("name") for part in parts]),
    ):
        if any(value != of_part[0] for value in of_part):
            raise ValueError(f"the parts differ in {key}: {of_part}; measure them again")
    # Where a part was written says nothing about the measurement.
    commands = [re.sub(r" --(out|logs|json) \S+", "", part["env"]["command"]) for part in parts]
    result = _joined(parts)
    # What was missing in any part; of all else in env, what the first part says.
    missing = _joined([{key: value for key, value in part["env"].items() if key in MISSING} for part in parts])
    return {**result, "env": {**parts[0]["env"], **missing, "versions": versions, "command": commands}}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return lists one after the other, dictionaries beside each other, all the way down; of other values the last."""
    result: dict[str, Any] = {}
    for key, value in ((key, value) for part in parts for key, value in part.items() if key != "env"):
        before = result.get(key)
        if isinstance(before, list) and isinstance(value, list):
            result[key] = before + value
        elif isinstance(before, dict) and isinstance(value, dict):
            result[key] = _joined([before, value])
        else:
            result[key] = value
    return result


def main() -> int:
    """Merge the files named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    arguments = parser.parse_args()
    write_json(arguments.out, merged([json.loads(path.read_text()) for path in arguments.parts]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
