"""`fp8-backend COMMAND`: one module a command, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
from contextlib import suppress

from fp8_backend.errors import Fp8BackendError

# Command -> (module with add_arguments(parser) and run(arguments) -> exit code, one line of help).
COMMANDS: dict[str, tuple[str, str]] = {
    "cache": ("fp8_backend.cache_command", "List, fill or empty the directory of compiled kernels."),
    "doctor": ("fp8_backend.doctor", "Say what this machine has, what is wrong and what to do about it."),
    "bench": (
        "fp8_backend.bench.command",
        "Time dense linears beside every peer and the streaming of their weights.",
    ),
    "ab": ("fp8_backend.ab.command", "Run the same vLLM with its default backend and with this one, and compare."),
    "inspect": ("fp8_backend.inspect_checkpoint", "Say what a checkpoint holds and what the kernels take of it."),
    "quantize": ("fp8_backend.quantize", "Turn a bf16 checkpoint into FP8 with 128x128 block scales."),
    "dequantize": ("fp8_backend.dequantize", "Turn an FP8 block checkpoint back into bf16."),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    A user's error, or one of the machine's files, is printed without a traceback and gives 2, an interrupt 130.
    """
    parser = argparse.ArgumentParser(prog="fp8-backend", description="FP8 block-scaled kernels for vLLM on Hopper.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if argv is None else argv
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in arguments[:1]:
            importlib.import_module(module).add_arguments(command)
    if sys.stdout is None:  # closed by whoever started this
        sys.stdout = open(os.devnull, "w")
    elif isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the locale cannot write
    try:
        parsed = parser.parse_args(arguments)
        code: int = importlib.import_module(COMMANDS[parsed.command][0]).run(parsed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head, has seen enough
        _drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _fail(arguments[0], "interrupted", 128 + signal.SIGINT)
    except Fp8BackendError as error:
        return _fail(arguments[0], str(error), 2)
    except OSError as error:  # no space, no permission
        what = f"{error.filename}: " if error.filename else ""
        return _fail(arguments[0], f"{what}{error.strerror or error}; check the path and the disk", 2)


def _fail(command: str, message: str, code: int) -> int:
    _drop_output()
    print(f"fp8-backend {command}: {message}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """Have what is left in the buffer go nowhere when Python ends, where it could not be written already."""
    with suppress(OSError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
