"""What the processes of `test_distributed.py` run on models that are spread over them:
`torchrun -m tests.tuning.train.sharded FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from ctkernels.testing.models import full_precision_norm, make_model, tokens
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.hf.parallel import reshard
from ctkernels.tuning.train.distributed import PeerError, is_sharded
from tests.tuning.runs import TOKENIZER, run, tensors

OPTIONS = {"drop_p": 0.3, "batch_rows": 3, "max_tokens": 12}  # 3 rows: 2 and 1, in as many micro-batches


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def check_same(sharded: PreTrainedModel, plain: PreTrainedModel, ids: Tensor, own: slice, folder: Path, group) -> None:
    """Prefixes, logits, gradients, tokens and a whole run are those of the model in one piece.

    own: the rows of `ids` that this process runs.  group: as in `tune`.
    """
    assert is_sharded(sharded) and not is_sharded(plain)
    logits, gradients, generated = [], [], []
    for model, rows in ((plain, slice(None)), (sharded, own)):
        prefix = KVPrefix.from_demonstrations(model, TOKENIZER, DEMONSTRATIONS)
        if model is sharded:
            assert not any(isinstance(x, DTensor) for x in prefix.parameters())
        with prefix.attach(model):
            out = model(ids[rows]).logits
            out.square().sum().backward()
            generated.append(model.generate(ids, max_new_tokens=4, do_sample=False))
        if model is sharded and own != slice(None):
            for x in prefix.parameters():
                dist.all_reduce(x.grad)
        logits.append(out.detach())
        gradients.append([x.grad for x in prefix.parameters()])
    close(logits[1], logits[0][own])
    for expected, actual in zip(*gradients, strict=True):
        close(actual / expected.abs().max(), expected / expected.abs().max())
    assert torch.equal(*generated)
    reshard(sharded)  # to see the gradients of all weights
    sharded.zero_grad()
    expected = run("ct-kv", plain, options=OPTIONS)
    actual = run("ct-kv", sharded, options=OPTIONS, group=group, checkpoint_dir=folder)
    for x, y in zip(tensors(expected.adapter), tensors(actual.adapter), strict=True):
        close(y, x)
    reshard(sharded)
    assert all(p.grad is None for p in sharded.parameters())  # a frozen model computes no gradient of its weights
    dist.barrier()
    # whoever wrote it, one process with the model in one piece can go on from it
    if dist.get_rank() == 0:  # a folder belongs to one run at a time
        resumed = run("ct-kv", plain, options=OPTIONS, checkpoint_dir=folder, resume=True)
        close(tensors(resumed.adapter)[0], tensors(actual.adapter)[0])
    dist.barrier()


def tensor_parallel(folder: Path) -> None:
    """KV heads over processes; Phi-3's fused projection is gathered, so that each of them runs all heads."""
    for name in ("llama", "phi3"):
        if dist.get_rank() == 0:
            make_model(name).save_pretrained(folder / name)
        dist.barrier()
        config = DistributedConfig(tp_plan="auto", tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=config, dtype=torch.float64)
        model.requires_grad_(False).eval()
        plain = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        plain.requires_grad_(False).eval()
        check_same(model, plain, tokens(3, 7), slice(None), folder / f"{name}-run", None)
        with pytest.raises(ValueError, match="ttt trains lora and needs weights in one piece"):
            run("ttt", model)


def fsdp(folder: Path) -> None:
    """Weights over processes with FSDP2, rows, too. The model was not frozen before."""
    model = make_model("llama").requires_grad_(True)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    rows = slice(dist.get_rank(), None, 2)
    check_same(model, make_model("llama"), tokens(4, 7), rows, folder / "fsdp-run", dist.group.WORLD)
    assert all(p.requires_grad for p in model.parameters())

    for name in ("prompt-tuning", "ttt"):
        with pytest.raises(ValueError, match=rf"{name} trains \w+ and needs weights in one piece"):
            run(name, model)

    def fail(record, module):
        if dist.get_rank() == 1:
            raise MemoryError("no space left")

    with pytest.raises(MemoryError if dist.get_rank() == 1 else PeerError) as caught:
        run("ct-kv", model, options=OPTIONS, group=dist.group.WORLD, on_epoch=fail)
    assert dist.get_rank() == 1 or "Connection closed by peer" in str(caught.value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with full_precision_norm():
        tensor_parallel(Path(sys.argv[1]))
        fsdp(Path(sys.argv[1]))
