"""Every test of the op runs on every backend that this machine has, through one of two fixtures."""

import re
from collections.abc import Iterator

import pytest

from ctkernels import dispatch
from ctkernels.testing.backends import Backend, backends, builds
from ctkernels.testing.pretend import BEYOND, NAMES, install, pretending

if pretending():
    install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a GPU is pretended, the tests of its backends."""
    if pretending():
        kept = [item for item in items if item.name.partition("[")[0] not in BEYOND]
        items[:] = [item for item in kept if re.search(rf"\[({'|'.join(NAMES)})\b", item.name)]


def _select(backend: Backend) -> Iterator[Backend]:
    if backend.isa is None:
        yield backend
        return
    before = dispatch.cpu_info()["isa"]
    dispatch.set_cpu_isa(backend.isa)
    yield backend
    dispatch.set_cpu_isa(before)


@pytest.fixture(params=backends(), ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every available backend, in its default build."""
    yield from _select(request.param)


@pytest.fixture(params=[b for b in backends() if b.device == "cpu"], ids=str)
def host_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend whose tensors are on the CPU: for what is found by reading values, which no GPU is waited for."""
    yield from _select(request.param)


@pytest.fixture(params=builds(), ids=str)
def build(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every available backend, the CPU backend once per instruction set: for tests of the arithmetic itself."""
    yield from _select(request.param)


@pytest.fixture(params=[b for b in builds() if b.isa], ids=str)
def cpu_build(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every build of the CPU kernels: for what concerns threads."""
    yield from _select(request.param)


@pytest.fixture(params=[b for b in backends() if b.kernel], ids=str)
def kernel_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every kernel backend, in its default build."""
    yield from _select(request.param)


@pytest.fixture(params=[b for b in builds() if b.wide], ids=str)
def wide_build(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every build that computes values of a head dimension of their own, and head dimensions above 256."""
    yield from _select(request.param)


@pytest.fixture(params=[b for b in builds() if b.double], ids=str)
def double_build(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every build that computes in fp64."""
    yield from _select(request.param)
