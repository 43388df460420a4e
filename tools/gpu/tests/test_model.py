"""The model of time: each bound by hand, and what it is silent about."""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Case
from tools.gpu import model

DEVICE = model.Device("Toy 100", "sm_80", multiprocessors=10, clock=1e9, matrix_flops=1000, memory=1e12, l2=2e12)
IDLE = {
    "matrix_flops": 0,
    "warp_instructions": 0,
    "special": 0,
    "shared_wavefronts": 0,
    "global_sectors": 0,
    "bytes_read": 0,
    "bytes_written": 0,
    "blocks": 10,
}
CASE = Case("toy", B=2, H=4, Hk=2, S=8, P=56, D=64, segments=4, dtype=torch.bfloat16)
RECORD = {
    "problem": {"D": 64, "dtype": "torch.bfloat16"},
    "pairs": model.pairs(CASE),
    "architectures": {
        "sm_80": {"forward": [{**IDLE, "matrix_flops": 10**10}], "backward": [{**IDLE, "matrix_flops": 3 * 10**10}] * 2}
    },
}


@pytest.mark.parametrize(
    "busy, fastest, slowest",
    [
        ({"matrix_flops": 10**10}, 1e-3, 1e-3),  # 10^13 per second
        ({"warp_instructions": 4 * 10**7}, 1e-3, 1e-3),  # four per clock on ten multiprocessors
        ({"special": 16 * 10**7}, 1e-3, 1e-3),
        ({"shared_wavefronts": 10**7}, 1e-3, 1e-3),
        ({"global_sectors": 10**9 // 16}, 1e-3, 1e-3),  # 2 GB at 2 TB/s
        ({"bytes_read": 4 * 10**8, "bytes_written": 6 * 10**8}, 1e-3, 1e-3),
        ({"matrix_flops": 10**10, "warp_instructions": 4 * 10**7}, 1e-3, 2e-3),  # without overlap one after the other
        ({"matrix_flops": 10**10, "blocks": 5}, 1e-3, 1e-3),  # the plan cuts such work until it fills the GPU
        ({"matrix_flops": 10**10, "blocks": 11}, 20 / 11 * 1e-3, 20 / 11 * 1e-3),
    ],
)
def test_a_kernel_takes_as_long_as_its_busiest_unit(busy, fastest, slowest):
    times = model.kernel_seconds({**IDLE, **busy}, DEVICE)
    assert times == pytest.approx((fastest + model.LAUNCH, slowest + model.LAUNCH))


def test_phases_add_up_and_pairs_scale():
    assert model.predict(CASE, "forward", DEVICE, RECORD) == pytest.approx(1e-3 + model.LAUNCH)
    assert model.predict(CASE, "both", DEVICE, RECORD) == pytest.approx(7e-3 + 3 * model.LAUNCH)
    twice = replace(CASE, B=4)  # and twice the blocks
    assert model.predict(twice, "forward", DEVICE, RECORD) == pytest.approx(2e-3 + model.LAUNCH)


def test_the_model_is_silent_where_nothing_was_counted():
    assert model.predict(replace(CASE, D=128), "both", DEVICE, RECORD) is None
    assert model.predict(replace(CASE, dtype=torch.float32), "both", DEVICE, RECORD) is None
    assert model.predict(CASE, "both", replace(DEVICE, architecture="sm_86"), RECORD) is None
    assert model.predicted_us(CASE, True, "NVIDIA GeForce RTX 4090", model.OURS) == {}
    assert model.predicted_us(CASE, True, "NVIDIA H100 80GB HBM3", "flash") == {}


def test_peers_pay_for_padding_expansion_and_sums():
    long = replace(CASE, S=128, P=4096, segments=0)
    for name in model.PEERS:
        assert model.peer_seconds(name, long, "both", DEVICE) == pytest.approx(
            model.peer_seconds(name, long, "forward", DEVICE) + model.peer_seconds(name, long, "backward", DEVICE)
        )
        # a row of 17 queries costs as much arithmetic as a full tile
        short = replace(long, S=17)
        arithmetic = 4 * long.B * long.H * model.PEERS[name].tile * (long.P + 17) * 64 / DEVICE.peak
        assert model.peer_seconds(name, short, "forward", DEVICE) > arithmetic / model.PEERS[name].forward
    # only FlexAttention leaves out hidden blocks, and it does not repeat keys for each head of a group
    hidden = replace(long, segments=2)
    assert model.peer_seconds("flex", hidden, "forward", DEVICE) < model.peer_seconds("flex", long, "forward", DEVICE)
    assert model.peer_seconds("sdpa", hidden, "forward", DEVICE) == model.peer_seconds("sdpa", long, "forward", DEVICE)


def test_the_crossover_is_where_a_peer_gets_faster(monkeypatch):
    record = {**RECORD, "pairs": RECORD["pairs"] / 100}  # so expensive that the peer wins at once
    assert model.crossover("flex", CASE, DEVICE, record) == 8
    cheap = {**RECORD, "pairs": RECORD["pairs"] * 10**6}
    assert model.crossover("flex", replace(CASE, B=64, P=4096), DEVICE, cheap) is None
    monkeypatch.setattr(model, "peer_seconds", lambda name, case, phase, device: 1e-6 if case.S >= 64 else 1.0)
    assert model.crossover("flex", replace(CASE, B=64), DEVICE, RECORD) == 64
    text = model.markdown(RECORD, [CASE, replace(CASE, name="silent", D=128)])
    assert "**A100**" in text and "toy (" in text and "silent" not in text


def test_a_step_by_hand():
    gpu, (_, h100) = "NVIDIA H100 80GB HBM3", model.DEVICES
    case = replace(CASE, B=16, H=32, Hk=8, S=32, P=1024)
    found = model.step_ms(case, layers=16, weights=10**9, head=10**8, gpu=gpu)
    assert found["attention"] == pytest.approx(16e-3 * model.predicted_us(case, True, gpu, model.OURS)["both"])
    products, small = 4 * 16 * 32 * 1e9 / (0.6 * h100.peak), 16 * 60 * 3e-6
    assert found["layers"] == pytest.approx(1e3 * (products + small))
    assert found["head"] == pytest.approx(1e3 * 2 * 2 * 1e8 / h100.memory)
    assert found["optimiser"] == pytest.approx(1e3 * 40 * (2 * 16 * 8 * 1024 * 64) / h100.memory)
    assert found.pop("step") == pytest.approx(sum(found.values()))
    few = model.step_ms(replace(case, B=1, S=8), layers=16, weights=10**9, head=10**8, gpu=gpu)
    assert few["layers"] == pytest.approx(1e3 * (2 * 2 * 1e9 / h100.memory + small))  # the weights are read twice
    assert model.step_ms(case, 16, 10**9, 10**8, "NVIDIA GeForce RTX 4090") is None
    assert model.device_of("NVIDIA H200") is model.H200
