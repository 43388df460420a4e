"""PrefixModel: one module of a frozen model and its prefixes, what its rows see, several prefixes, copies and modes."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ctkernels import ContextMask
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.adapters.prefix_model import PrefixModel
from tests.tuning.adapters.prefix_models import batch, close, make_prefix, prefix_model, same_bits, values
from tests.tuning.hf.test_models_attach import snapshot
from tests.tuning.runs import TOKENIZER


def logits(model, **arguments):
    given = {name: x for name, x in batch().items() if name in ("input_ids", "attention_mask")}
    return model(**given, use_cache=False, **arguments).logits


@torch.no_grad()
def attached_logits(model: PrefixModel, mask: ContextMask | None = None):
    """Of the same model and prefix, attached by hand."""
    base, prefix = model.get_base_model(), model.prefixes["default"]
    with model.disable_adapter(), prefix.attach(base, mask=mask):
        return logits(base)


# one module


def test_its_parameters_and_state_are_the_prefix_alone():
    base = make_model("gpt2", torch.float32).requires_grad_(True).train()
    before = snapshot(base)
    prefix = make_prefix(base)
    model = PrefixModel(base, prefix)
    assert list(model.parameters()) == list(prefix.parameters())
    tensors = {name.removeprefix("prefixes.default.") for name in model.state_dict()} - {"_extra_state"}
    assert tensors == set(prefix.state_dict())
    assert not any(module is base for module in model.modules())
    assert not any(p.requires_grad for p in base.parameters())
    assert model.config is base.config and model.num_parameters() == base.num_parameters()
    assert repr(model).startswith("PrefixModel of GPT2LMHeadModel(")
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.no_such
    assert model.unload() is base and snapshot(base) == before
    assert all(p.requires_grad for p in base.parameters()) and base.training
    for use in (
        lambda: logits(model),
        lambda: model.generate(batch()["input_ids"]),
        lambda: model.set_adapter("default"),
    ):
        with pytest.raises(ValueError, match="was unloaded"):
            use()
    model.train()
    assert snapshot(base) == before


def test_a_model_without_its_prefix_model_is_plain_again():
    """Would catch: a model that stays attached, with nothing left to detach it by."""
    model = prefix_model()
    base = model.get_base_model()
    with model.disable_adapter():
        plain = logits(base)
    assert not torch.equal(logits(base), plain)
    with pytest.raises(ValueError, match="unload its PrefixModel"):
        PrefixModel(base, make_prefix(make_model("llama", torch.float32)))
    del model
    gc.collect()
    assert torch.equal(logits(base), plain)
    PrefixModel(base, make_prefix(base))


def test_what_is_no_model_or_no_prefix():
    base = make_model("llama", torch.float32)
    prefix = make_prefix(base)
    with pytest.raises(TypeError, match="model must be a transformers model, got KVPrefix"):
        PrefixModel(prefix, base)
    with pytest.raises(TypeError, match="prefix 'a' must be a KVPrefix, got int"):
        PrefixModel(base, {"a": 3})
    with pytest.raises(ValueError, match="several by name, got none"):
        PrefixModel(base, {})
    with pytest.raises(ValueError, match="drop_p must be in"):
        PrefixModel(base, prefix, drop_p=1.5)
    with pytest.raises(ValueError, match="prefix has 3 layers, LlamaForCausalLM has 2"):
        PrefixModel(make_model("llama", torch.float32, num_hidden_layers=2), prefix)
    with pytest.raises(TypeError, match="model must be a transformers model, got str; source comes second"):
        PrefixModel.from_pretrained("me/model", "me/prefix")
    PrefixModel(base, prefix)  # nothing was left behind


def test_it_counts_parameters(capsys):
    model = prefix_model()
    own = sum(p.numel() for p in model.parameters())
    assert model.get_nb_trainable_parameters() == (own, own + model.num_parameters())
    model.print_trainable_parameters()
    percent = f"{100 * own / (own + model.num_parameters()):.4f}"
    expected = f"trainable params: {own:,} || all params: {own + model.num_parameters():,} || trainable%: {percent}\n"
    assert capsys.readouterr().out == expected


def test_modes_reach_the_model_and_its_dropout_stays_off():
    model = prefix_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    base = model.get_base_model()
    assert model.training and torch.equal(logits(model), attached_logits(model))
    base.activation_checkpointing_enable()
    model.train()
    assert base.transformer.h[0].training and not base.transformer.h[0].mlp.dropout.training
    model.eval()
    assert not any(module.training for module in base.modules())


def test_to_reaches_both():
    model = prefix_model().to(torch.float64)
    assert {p.dtype for p in (*model.parameters(), *model.get_base_model().parameters())} == {torch.float64}
    assert logits(model).dtype == torch.float64
    assert not model.prefixes["default"].segments.is_floating_point()


def test_a_copy_has_a_model_and_prefixes_of_its_own():
    model = prefix_model(drop_p=0.3)
    model.add_adapter("other", copy.deepcopy(model.prefixes["default"]))
    model.set_adapter("other")
    copied = copy.deepcopy(model.eval())
    assert copied.active_adapter == "other" and copied.drop_p == 0.3 and not copied.training
    assert copied.get_base_model() is not model.get_base_model()
    expected = logits(model)
    with torch.no_grad():
        copied.prefixes["other"].keys[0].zero_()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(copied), expected)


def test_data_parallel_of_several_devices_is_refused():
    with pytest.raises(ValueError, match=r"torchrun or accelerate launch"):
        prefix_model()._replicate_for_data_parallel()


# what rows see


@torch.no_grad()
def test_held_out_hides_a_demonstration():
    model = prefix_model()
    held_out = torch.tensor([2, -1, 0, 4, 1])
    segments = model.prefixes["default"].segments
    expected = attached_logits(model, ContextMask.leave_one_out(segments, held_out))
    assert torch.equal(logits(model, held_out=held_out), expected)
    assert torch.equal(logits(model, held_out=held_out.tolist()), expected)
    assert torch.equal(logits(model.eval(), held_out=held_out), expected)
    assert torch.equal(logits(model), attached_logits(model)) and not torch.equal(logits(model), expected)
    assert torch.equal(logits(model, mask=ContextMask.leave_one_out(segments, held_out)), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, held_out=held_out), logits(model))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"held_out": [0, 1, 2, 3, 5]}, ValueError, r"held_out must be in \[-1, 5\) for 5 segments, got 5"),
        ({"held_out": [0, 1]}, ValueError, "held_out must have an entry for each of 5 rows, got 2"),
        ({"held_out": torch.zeros(5)}, TypeError, "held_out must be an int32 or int64 tensor"),
        ({"row_ids": [0, 1]}, ValueError, "row_ids must have an entry for each of 5 rows, got 2"),
        ({"dropout_seed": torch.tensor([1, 1, 1, 1, 2])}, ValueError, r"one integer for a batch, got \[1, 2\]"),
        ({"dropout_seed": 0.5}, TypeError, "seed must be a 64-bit integer or an int64 tensor"),
        ({"mask": 3}, TypeError, "must be a ContextMask or None, got int"),
        ({"mask": ContextMask(), "held_out": [0] * 5}, ValueError, "give mask, or held_out"),
    ],
)
def test_what_rows_cannot_be_told(arguments, error, message):
    model = prefix_model(drop_p=0.3)
    with pytest.raises(error, match=message):
        logits(model, **arguments)
    assert torch.equal(logits(model.eval()), attached_logits(model))  # nothing of it stays


@torch.no_grad()
def test_token_dropout_in_training_mode():
    model = prefix_model(drop_p=0.4)
    whole = attached_logits(model)

    def drawn(seed: int):
        torch.manual_seed(seed)
        return logits(model)

    first, second = drawn(1), logits(model)
    assert torch.equal(drawn(1), first) and not torch.equal(second, first) and not torch.equal(drawn(2), first)
    expected = ContextMask(drop_p=0.4, seed=5)
    state = torch.get_rng_state()
    assert torch.equal(logits(model, dropout_seed=5), attached_logits(model, expected))
    assert torch.equal(logits(model, dropout_seed=torch.tensor([5] * 5)), attached_logits(model, expected))
    numbered = replace(expected, row_ids=torch.tensor([7, 3, 2**32 - 1, 0, 4]))
    assert torch.equal(logits(model, dropout_seed=5, row_ids=numbered.row_ids), attached_logits(model, numbered))
    held_out = torch.tensor([2, -1, 0, 4, 1])
    both = ContextMask.leave_one_out(model.prefixes["default"].segments, held_out, 0.4, 5, numbered.row_ids)
    actual = logits(model, held_out=held_out, dropout_seed=5, row_ids=numbered.row_ids.tolist())
    assert torch.equal(actual, attached_logits(model, both))
    model.eval()
    assert torch.equal(logits(model), whole) and torch.equal(logits(model, dropout_seed=5), whole)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn where nothing is dropped


@torch.no_grad()
def test_packed_rows():
    """As `DataCollatorWithFlattening` makes them, with one `held_out` for each row."""
    model = prefix_model()
    ids, mask = batch()["input_ids"], batch()["attention_mask"].bool()
    lengths = mask.sum(1)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()))
    packed = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    held_out = torch.tensor([2, -1, 0, 4, 1])
    actual = model(ids[mask][None], held_out=held_out, use_cache=False, **packed).logits[0]
    torch.testing.assert_close(actual, logits(model, held_out=held_out)[mask], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_sees_the_whole_prefix():
    model = prefix_model(drop_p=0.5).eval()
    row = batch(1)["input_ids"]
    base = model.get_base_model()
    with model.disable_adapter():
        plain = model.generate(row, max_new_tokens=6, do_sample=False)
        with model.prefixes["default"].attach(base):
            expected = base.generate(row, max_new_tokens=6, do_sample=False)
    model(row, held_out=[1])  # hides a demonstration in this pass alone
    assert torch.equal(model.generate(row, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(base(row).logits, model(row).logits) and not torch.equal(plain, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled(name):
    """One graph without breaks: model, prefix, leave-one-out, token dropout, loss. Seeds do not recompile it."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = prefix_model(name, drop_p=0.3)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in (1, 2, 2**40 + 1):
        found = []
        for each in (model, compiled):
            model.zero_grad()
            loss = each(**batch(), dropout_seed=seed, use_cache=False).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters())])
        close(found[1], found[0], 1e-4)
    assert counter.frame_count <= 2  # the first seed is a constant, then it is not
    with pytest.raises(RuntimeError, match="held_out must be the index of a demonstration"):
        compiled(**{**batch(), "held_out": torch.tensor([0, 1, 2, 3, 5])}, dropout_seed=3, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")  # a seed that is drawn interrupts the graph, no more
    torch.manual_seed(3)
    expected = model(**batch(), use_cache=False).loss
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(**batch(), use_cache=False).loss, expected)
    torch._dynamo.reset()


# several prefixes


@torch.no_grad()
def test_named_prefixes():
    base = make_model("llama", torch.float32)
    first, second = make_prefix(base), KVPrefix.from_demonstrations(base, TOKENIZER, DEMONSTRATIONS[1:4])
    expected = {}
    for name, prefix in (("first", first), ("second", second)):
        with prefix.attach(base):
            expected[name] = logits(base)
    expected["none"] = logits(base)

    model = PrefixModel(base, {"first": first})
    model.add_adapter("second", second)
    assert model.active_adapter == "first" and torch.equal(logits(model), expected["first"])
    assert not any(p.requires_grad for p in second.parameters())
    model.set_adapter("second")
    assert model.active_adapters == ["second"] and torch.equal(logits(model), expected["second"])
    assert all(p.requires_grad for p in second.parameters()) and not any(p.requires_grad for p in first.parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), expected["none"])
        with model.disable_adapter():
            model.set_adapter("first")
        assert torch.equal(logits(model), expected["none"])
    assert torch.equal(logits(model), expected["first"])
    with pytest.raises(ValueError, match="'first' is active"):
        model.delete_adapter("first")
    model.delete_adapter("second")
    for call, message in (
        (lambda: model.set_adapter("second"), "there is no prefix 'second'; there are first"),
        (lambda: model.delete_adapter("third"), "there is no prefix 'third'"),
        (lambda: model.add_adapter("first", second), "'first' is taken"),
        (lambda: model.add_adapter("a.b", second), r"letters, digits, _ and -, got 'a\.b'"),
        (lambda: model.add_adapter("other", make_prefix(make_model("gpt2", torch.float32))), "LlamaForCausalLM has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(model.prefixes) == ["first"] and torch.equal(logits(model), expected["first"])


def test_what_a_user_froze_stays_frozen():
    base = make_model("llama", torch.float32)
    prefix = make_prefix(base)
    prefix.keys[0].requires_grad_(False)
    model = PrefixModel(base, prefix)
    logits(model).sum().backward()
    assert prefix.keys[0].grad is None and prefix.keys[1].grad is not None


# its state


def test_a_state_goes_into_the_same_prefixes_alone():
    model = prefix_model()
    state = copy.deepcopy(model.state_dict())
    before = values(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model.load_state_dict(state)
    assert same_bits(values(model), before)
    model.add_adapter("other", make_prefix(make_model("llama", torch.float32)))
    with pytest.raises(ValueError, match="the state is of the prefixes default; this model has default, other"):
        model.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match=r"made for LlamaForCausalLM .*this GPT2LMHeadModel"):
        prefix_model("gpt2").load_state_dict(state, strict=False)
    model.delete_adapter("other")
    model.prefixes["default"].first_position += 1
    with pytest.raises(ValueError, match=r"begin at position (\d+), here at \d+"):
        model.load_state_dict(state)
