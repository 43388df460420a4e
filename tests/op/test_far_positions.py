"""Windows, ALiBi and the causal rule beyond position 2^24, where fp32 cannot tell neighbours apart."""

import pytest
import torch

from ctkernels.testing.calls import cotangents_for, make_call, run

FAR, NEAR = 2**24 + 5, 300  # all keys but the last NEAR are hidden
RULES = {
    "window": dict(window=4),
    "ALiBi": dict(alibi_slopes=torch.tensor([0.5])),
    "window and ALiBi": dict(window=7, alibi_slopes=torch.tensor([0.5])),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("far", ["prefix_k", "k"])
def test_far_keys(cpu_build, far, rule):
    """A prefix of 2^24 + 5 keys before rows of three, and as many own keys, of which the last three have queries.

    Rules count distances, so that a short prefix, or few own keys, give the same.
    """
    sizes = dict(P=NEAR) if far == "prefix_k" else dict(T=NEAR, P=0)
    near = make_call(B=1, H=1, Hk=1, S=3, D=1, types="fp32", **sizes, **RULES[rule])
    tensors = dict(near.tensors)
    for name in (far, far.replace("k", "v")):
        *front, _, D = tensors[name].shape
        tensors[name] = torch.cat([torch.zeros(*front, FAR - NEAR, D), tensors[name]], -2)
    call = near.with_tensors(**tensors).with_mask(length=FAR, hidden=torch.tensor([[0, FAR - NEAR]]))
    cotangents = cotangents_for(near) if far == "prefix_k" else None  # own gradients of 2^24 keys take GB
    got, expected = run(call, cpu_build, cotangents), run(near, cpu_build, cotangents)
    for name, x in expected.items():
        y = got[name]
        if name[1:] in (far, far.replace("k", "v")):
            assert not y[..., :-NEAR, :].any(), name
            y = y[..., -NEAR:, :]
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
