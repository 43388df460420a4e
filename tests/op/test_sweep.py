"""Forward, lse and every gradient against the dense oracle in fp64: random shapes, strides, types and mask kinds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctkernels.testing.calls import TYPES, cotangents_for
from ctkernels.testing.compare import assert_right_or_refused
from ctkernels.testing.strategies import calls

COTANGENT_LAYOUTS = st.sampled_from(["plain", "transposed", "expanded"])


@given(data=st.data())
def test_sweep_double(double_build, data):
    check(double_build, data, "fp64")


@pytest.mark.parametrize("types", [types for types in TYPES if types != "fp64"])
@given(data=st.data())
def test_sweep(build, types, data):
    check(build, data, types)


def check(build, data, types):
    call = data.draw(calls(types))
    cotangents = cotangents_for(call, layout=data.draw(COTANGENT_LAYOUTS))
    assert_right_or_refused(call, build, cotangents)


@pytest.mark.parametrize("types", ["fp32", "bf16"])
@given(data=st.data())
def test_sweep_forward_only(build, types, data):
    """Without gradients a kernel may take another path (no lse kept, other tiles)."""
    call = data.draw(calls(types))
    assert_right_or_refused(call, build, None)
