"""`fp8-backend COMMAND`: one module a command, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys

from fp8_backend.errors import Fp8BackendError

# Command -> (module with add_arguments(parser) and run(arguments) -> exit code, one line of help).
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("fp8_backend.inspect_checkpoint", "what a checkpoint holds, and what the kernels take of it"),
    "quantize": ("fp8_backend.quantize", "a bf16 checkpoint to FP8 with 128x128 block scales"),
    "dequantize": ("fp8_backend.dequantize", "an FP8 block checkpoint back to bf16"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code; a user's error is printed without a traceback and gives 2."""
    parser = argparse.ArgumentParser(prog="fp8-backend", description="FP8 block-scaled kernels for vLLM on Hopper.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if argv is None else argv
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in arguments[:1]:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(arguments)
    try:
        return importlib.import_module(COMMANDS[parsed.command][0]).run(parsed)
    except Fp8BackendError as error:
        print(f"fp8-backend {parsed.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
