"""The compiler on real kernels: NVRTC needs no GPU."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from fp8_backend.errors import CompileError
from fp8_backend.kernels import compiler
from fp8_backend.kernels.compiler import KernelSpec, cache_key, compile_kernel

HERE = Path(__file__).parent
SAXPY = KernelSpec("saxpy.cuh", "saxpy", (("OFFSET", 3),), HERE)


@pytest.fixture
def copied(tmp_path: Path) -> KernelSpec:
    """The test kernel in a folder that a test may change."""
    for name in ("saxpy.cuh", "saxpy_offset.cuh"):
        shutil.copy(HERE / name, tmp_path)
    return dataclasses.replace(SAXPY, folder=tmp_path)


def _spec(folder: Path, text: str, entry: str = "kernel") -> KernelSpec:
    (folder / "kernel.cuh").write_text(text)
    return KernelSpec("kernel.cuh", entry, (), folder)


def test_compiles_to_a_cubin_with_the_facts_of_the_log() -> None:
    kernel = compile_kernel(SAXPY)
    assert kernel.cubin[:4] == b"\x7fELF"
    assert b"saxpy" in kernel.cubin
    assert f"Used {kernel.registers} registers" in kernel.log
    assert kernel.registers > 0
    assert (kernel.spill_bytes, kernel.stack_bytes, kernel.warnings) == (0, 0, ())


def test_defines_reach_the_code() -> None:
    assert compile_kernel(SAXPY).cubin != compile_kernel(dataclasses.replace(SAXPY, defines=(("OFFSET", 4),))).cubin


def test_name_is_readable() -> None:
    assert SAXPY.name == "saxpy-OFFSET=3"
    assert (
        KernelSpec("gemm.cuh", "gemm_decode", (("BLOCK_M", 64), ("PDL", 1))).name == "gemm-gemm_decode-BLOCK_M=64-PDL=1"
    )


def test_error_names_the_kernel_the_file_and_the_line(tmp_path: Path) -> None:
    spec = _spec(tmp_path, '\n\nextern "C" __global__ void kernel() { undeclared(); }\n')
    with pytest.raises(CompileError, match=r'(?s)kernel kernel .*kernel\.cuh\(3\): error: identifier "undeclared"'):
        compile_kernel(spec)


def test_error_in_a_header_names_the_header(copied: KernelSpec) -> None:
    (copied.folder / "saxpy_offset.cuh").write_text("int broken() { return 1 }\n")
    with pytest.raises(CompileError, match=r"saxpy_offset\.cuh\(\d\): error"):
        compile_kernel(copied)


def test_missing_sources_are_named(copied: KernelSpec) -> None:
    (copied.folder / "saxpy_offset.cuh").unlink()
    with pytest.raises(CompileError, match=r"saxpy_offset\.cuh \(included by saxpy\.cuh\): No such file"):
        compile_kernel(copied)
    with pytest.raises(CompileError, match=r"absent\.cuh \(the kernel's file\)"):
        compile_kernel(dataclasses.replace(copied, file="absent.cuh"))


def test_wrong_entry_is_named_with_what_is_there() -> None:
    with pytest.raises(CompileError, match=r"'nope' is not in the compiled file \(it has: saxpy\)"):
        compile_kernel(dataclasses.replace(SAXPY, entry="nope"))


def test_headers_of_the_current_directory_are_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "stray.cuh").write_text("")
    monkeypatch.chdir(elsewhere)
    # The macro hides the include from our parser: what NVRTC may see beyond the hashed sources is what matters.
    spec = _spec(tmp_path, '#define STRAY "stray.cuh"\n#include STRAY\nextern "C" __global__ void kernel() {}\n')
    with pytest.raises(CompileError, match=r"stray\.cuh"):
        compile_kernel(spec)


def test_spills_and_stack_are_counted(tmp_path: Path) -> None:
    # 8 registers short of what 64 live accumulators need, so that ptxas has to spill.
    text = """extern "C" __global__ void __launch_bounds__(1024, 2) kernel(float* x) {
      float a[64];
      for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];
      __syncthreads();
      for (int r = 0; r < 64; ++r)
        for (int i = 0; i < 64; ++i) x[r * 65536 + i * 1024 + threadIdx.x] = a[i] * a[(i + r) % 64];
    }"""
    kernel = compile_kernel(_spec(tmp_path, text))
    assert kernel.registers == 32
    assert kernel.spill_bytes > 0
    assert kernel.stack_bytes > 0


def test_log_of_several_entries_is_told_apart(tmp_path: Path) -> None:
    text = """extern "C" __global__ void first(int* x) { x[threadIdx.x] = 1; }
    extern "C" __global__ void second(double* x, int n) {
      double s = 0; for (int i = 0; i < n; ++i) s = s / (x[i] + 1) + x[i] * x[i]; x[threadIdx.x] = s; }"""
    first = compile_kernel(_spec(tmp_path, text, "first"))
    second = compile_kernel(_spec(tmp_path, text, "second"))
    assert first.log.count("Compiling entry function") == 2
    assert first.registers < second.registers


def test_ignored_setmaxnreg_is_a_warning(tmp_path: Path) -> None:
    # Without __launch_bounds__ ptxas cannot honour setmaxnreg, and says so in a note alone.
    text = """extern "C" __global__ void kernel(int* x) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
      x[threadIdx.x] = 1;
    }"""
    (warning,) = compile_kernel(_spec(tmp_path, text)).warnings
    assert "(C7508)" in warning


def test_front_end_warnings_are_kept(tmp_path: Path) -> None:
    kernel = compile_kernel(_spec(tmp_path, 'extern "C" __global__ void kernel() {\n int unused; }'))
    assert [warning for warning in kernel.warnings if "kernel.cuh(2): warning" in warning]


def test_key_depends_on_everything_that_changes_the_cubin(copied: KernelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [cache_key(copied)]
    keys.append(cache_key(dataclasses.replace(copied, defines=(("OFFSET", 4),))))
    keys.append(cache_key(dataclasses.replace(copied, entry="other")))
    header = copied.folder / "saxpy_offset.cuh"
    header.write_text(header.read_text() + '\n#include "deeper.cuh"\n')
    (copied.folder / "deeper.cuh").write_text("// one\n")
    keys.append(cache_key(copied))
    (copied.folder / "deeper.cuh").write_text("// two\n")
    keys.append(cache_key(copied))
    for name, value in (("FLAGS", ("-other",)), ("ARCH", "sm_100a"), ("SCHEMA", 0), ("nvrtc_version", lambda: "0.0+0")):
        with monkeypatch.context() as patch:
            patch.setattr(compiler, name, value)
            keys.append(cache_key(copied))
    assert len(set(keys)) == len(keys) == 9


def test_key_does_not_depend_on_where_the_sources_lie(copied: KernelSpec) -> None:
    assert cache_key(copied) == cache_key(SAXPY)
    assert compiler.source_digest(copied) == compiler.source_digest(SAXPY)


def test_what_was_hashed_is_what_is_compiled(copied: KernelSpec) -> None:
    sources = compiler.read_sources(copied)
    (copied.folder / "saxpy_offset.cuh").write_text("__device__ float offset() { return 12345.f; }")
    assert compile_kernel(copied, sources).cubin == compile_kernel(SAXPY).cubin != compile_kernel(copied).cubin


def test_nvrtc_that_lacks_a_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another library of that name does which was loaded before ours."""

    def absent(*_: object) -> None:
        raise RuntimeError("function nvrtcCreateProgram is not found")

    monkeypatch.setattr(compiler._nvrtc(), "nvrtcCreateProgram", absent)
    with pytest.raises(CompileError, match=r"^kernel saxpy.*NVRTC 13\..*nvrtcCreateProgram is not found; pip install"):
        compile_kernel(SAXPY)
