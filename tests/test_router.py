"""The linear in front of experts: the kernel on the emulated multiprocessor and on a GPU, and who is given it."""

from __future__ import annotations

import shutil

import pytest
import torch

from fp8_backend.errors import ArgumentError
from fp8_backend.kernels import router
from fp8_backend.kernels.problem import Machine
from fp8_backend.kernels.reference import relative_error
from tests.emulation import emulated

BF16_ERROR, F16_ERROR = 0.0025, 0.0004  # rounding of the outputs


def operands(m, n, k, dtype, device="cpu", padding=0):
    torch.manual_seed(m + n)
    x = torch.randn(m, k + padding, device=device).to(dtype)[:, :k]
    weight = torch.randn(n, k, device=device).to(dtype)
    return x, weight, x.double() @ weight.double().t()


def assert_product(found, expected, dtype):
    assert found.shape == expected.shape and found.dtype == dtype and found.is_contiguous()
    assert relative_error(found, expected) < (BF16_ERROR if dtype == torch.bfloat16 else F16_ERROR)


# One row and all 64; chunks that k does not fill, fewer than warps, and more than are fetched ahead; rows apart.
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the device code for the CPU")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 8), (17, 16, 1000), (64, 8, 264), (5, 8, 10272)])
@pytest.mark.parametrize("dtype", router.DTYPES)
def test_products(m, n, k, dtype, tmp_path_factory):
    x, weight, expected = operands(m, n, k, dtype, padding=8)
    with emulated(tmp_path_factory.getbasetemp(), Machine(2, (1, 1, 1))) as machine:
        assert_product(router.router_linear(x, weight), expected, dtype)
        assert torch.equal(router.router_linear(x[:1], weight)[0], router.router_linear(x, weight)[0])
        assert [spec for spec, _ in machine.loaded] == [router.SPEC]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(128, 2048), (128, 4096), (256, 7168), (512, 2048), (8, 64), (24, 1048)])
@pytest.mark.parametrize("dtype", router.DTYPES)
def test_products_on_a_gpu(n, k, dtype):
    for m in (1, 2, 7, 16, 33, 64, 65, 300):
        x, weight, expected = operands(m, n, k, dtype, "cuda")
        found = router.router_linear(x, weight)
        assert_product(found, expected, dtype)
        assert torch.equal(found, router.router_linear(x, weight))


@pytest.mark.gpu
def test_it_waits_for_the_rows_on_a_gpu():
    """It starts while the kernel before it runs: in a graph, what it reads must be this replay's."""
    from fp8_backend.kernels import norm

    source, weight, _ = operands(16, 128, 2048, torch.bfloat16, "cuda")
    ones = torch.ones(2048, device="cuda", dtype=torch.bfloat16)

    def call():
        return router.router_linear(norm.rms_norm_quant(source, None, ones, 1e-6, keep=True).normed, weight)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for seed in range(20):
        torch.manual_seed(seed)
        source.normal_()
        graph.replay()
        assert torch.equal(found, call()), seed


def test_operands_that_do_not_fit_are_refused():
    x, weight, _ = operands(2, 8, 64, torch.bfloat16)
    wrong = weight.float(), weight[:, :-1], weight[0], weight.to("meta")
    for one, other in ((x[0], weight), *((x, each) for each in wrong)):
        with pytest.raises(ArgumentError, match=r"expected \[m, k\] for a weight .*; reshape, convert or move it"):
            router.router_linear(one, other)


def test_what_the_kernel_does_not_take_is_torchs():
    x, weight, expected = operands(3, 9, 65, torch.bfloat16)
    assert_product(router.router_linear(x, weight), expected, torch.bfloat16)
