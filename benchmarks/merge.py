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


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parts as one result: lists one after the other, other entries beside each other, every command kept.

    Raises:
        ValueError: the parts come from different commits or machines, so they are not one measurement.
    """
    for key in ("commit", "versions"):
        if len({json.dumps(part["env"][key], sort_keys=True) for part in parts}) > 1:
            raise ValueError(f"the parts differ in {key}: {[part['env'][key] for part in parts]}; measure them again")
    # Where a part was written says nothing about the measurement.
    commands = [re.sub(r" --(out|logs) \S+", "", part["env"]["command"]) for part in parts]
    result: dict[str, Any] = {"env": {**parts[0]["env"], "command": commands}}
    for part in parts:
        for key, value in part.items():
            if key == "env":
                continue
            result[key] = result.get(key, []) + value if isinstance(value, list) else {**result.get(key, {}), **value}
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
