"""Attention kernels against float64."""

import re
import struct

import ptxemu
import pytest

torch = pytest.importorskip("torch")


def reference(q, k, v):
    """Causal attention over [..., length, dim] in float64: (output, log-sum-exp)."""
    q, k, v = (x.double() for x in (q, k, v))
    length = q.shape[-2]
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    s = s.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


@pytest.fixture(scope="module")
def cuda_attention(kernels):
    return ptxemu.compile_cuda(kernels / "attention.cu")


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("length", [1, 64, 100, 257])
@pytest.mark.parametrize("mode, seed", [("eager", 0), ("lazy", 7)])
def test_cuda_attention(cuda_attention, length, mode, seed):
    batch, heads, dim = 1, 2, 64
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, dim).bfloat16() for _ in range(3))
    out, lse = torch.zeros_like(q), torch.zeros(batch * heads, length)
    parameters = struct.pack("<QQQQQiif4x", *(ptxemu.pointer(x) for x in (q, k, v, out, lse)), length, heads, dim**-0.5)
    cuda_attention.launch(
        "attention_forward", ((length + 63) // 64, batch * heads), 128, [parameters],
        shared_bytes=5 * 64 * 64 * 2, mode=mode, schedule_seed=seed, buffers=[q, k, v, out, lse],
    )  # fmt: skip
    expected, expected_lse = reference(*(x.transpose(1, 2) for x in (q, k, v)))
    assert (out.transpose(1, 2).double() - expected).abs().max() < 2e-2
    assert (lse.double() - expected_lse.reshape(batch * heads, length)).abs().max() < 1e-3


@pytest.mark.needs_nvcc
def test_pointers_in_structs_are_checked(cuda_attention):
    """A buffer that is neither passed nor registered, or is too short, is an error."""
    q, k, v = (torch.randn(1, 64, 1, 64).bfloat16() for _ in range(3))
    out, lse = torch.zeros_like(q), torch.zeros(1, 63)
    parameters = struct.pack("<QQQQQiif4x", *(ptxemu.pointer(x) for x in (q, k, v, out, lse)), 64, 1, 0.125)

    def launch(buffers):
        return cuda_attention.launch("attention_forward", 1, 128, [parameters], shared_bytes=40960, buffers=buffers)

    with pytest.raises(ptxemu.KernelFault, match=r"ends 4 bytes past the end of buffers\[4\] \(252 bytes\)"):
        launch([q, k, v, out, lse])
    with pytest.raises(ptxemu.KernelFault, match="outside every buffer passed or registered"):
        launch([q, k, v, lse])


def compile_triton(arch, kind):
    pytest.importorskip("triton")
    from kernels.triton_attention import attention_forward

    pointer = f"*{kind}"
    return ptxemu.compile_triton(
        attention_forward,
        dict(q_ptr=pointer, k_ptr=pointer, v_ptr=pointer, out_ptr=pointer, lse_ptr="*fp32", stride_head="i32",
             stride_row="i32", length="i32", scale="fp32"),
        dict(ROWS=64, COLUMNS=32, DIM=64),
        arch=arch,
        divisible_by_16=["q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "stride_head", "stride_row"],
    )  # fmt: skip


def run_triton(module, inputs, **options):
    heads, length, dim = inputs[0].shape
    out, lse = torch.zeros_like(inputs[0]), torch.zeros(heads, length)
    arguments = [*inputs, out, lse, length * dim, dim, length, dim**-0.5]
    module.run(((length + 63) // 64, heads), arguments, **options)
    return out, lse


@pytest.mark.needs_ptxas
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_triton_attention(arch, kind):
    module = compile_triton(arch, kind)
    if arch == 90 and kind != "fp32":
        assert "wgmma.mma_async" in module.ptx
    assert module.metadata["shared"] > 0 and module.metadata["num_warps"] == 4
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    torch.manual_seed(0)
    inputs = [torch.randn(2, 150, 64).to(dtype) for _ in range(3)]
    expected, expected_lse = reference(*inputs)
    for mode, seed in (("eager", 0), ("lazy", 3)):
        out, lse = run_triton(module, inputs, mode=mode, schedule_seed=seed)
        assert (out.double() - expected).abs().max() < 2e-2
        assert (lse.double() - expected_lse).abs().max() < 5e-3


@pytest.mark.needs_ptxas
@pytest.mark.parametrize(
    "line, words",
    [
        (r"wgmma\.fence\.sync\.aligned;", "needs a wgmma.fence before it"),
        (r"wgmma\.wait_group\.sync\.aligned\s+0;", "is accessed before wgmma.wait_group"),
        (r"fence\.proxy\.async\S*;", "no fence.proxy.async comes between"),
    ],
)
def test_what_a_compiler_must_not_forget(line, words):
    """Code of Triton for sm_90 without the fences, or the waits, that its products need."""
    module = compile_triton(90, "bf16")
    text, count = re.subn(line, "", module.ptx)
    broken = type(module)(text, module.metadata, module.cubin)
    with pytest.raises(ptxemu.KernelFault, match=re.escape(words)) as caught:
        run_triton(broken, [torch.randn(1, 100, 64).bfloat16() for _ in range(3)])
    assert count and caught.value.kind == "async_hazard"
