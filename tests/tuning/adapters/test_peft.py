"""Adapters in peft's format: peft itself loads ours and computes the same, and what peft saved loads into ours."""

import json
from dataclasses import replace

import pytest
import torch
from peft import CartridgeConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ctkernels import cli
from ctkernels.testing.models import (
    MODELS,
    full_precision_norm,
    full_precision_softmax,
    make_model,
    pad_rows,
    tokens,
)
from ctkernels.tuning import Adapter, KVPrefix, SoftPrompt, export_peft, import_peft
from ctkernels.tuning.adapters.file import PrefixFileError
from ctkernels.tuning.adapters.lora import Lora, lora_parameters, lora_targets
from ctkernels.tuning.adapters.prefix import PrefixMetadata, tokenizer_hash
from ctkernels.tuning.evaluation.calibration import Offsets
from tests.tuning.runs import ITEMS, TOKENIZER, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # of peft itself
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
CONTEXT, SEGMENTS = tokens(11, seed=2), torch.tensor([1, 6, 11])  # longer than the tests' windows
ROW = tokens(1, 9, seed=3)
WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3", "phi3")


@pytest.fixture(autouse=True, scope="module")
def exact():
    with full_precision_softmax(), full_precision_norm():
        yield


def tuned(model) -> KVPrefix:
    """A prefix that is no cache of any text, in values that fp32 holds, which is what peft loads."""
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).copy_(parameter.float())
    return prefix


def tuned_prompt(model) -> Adapter:
    prompt = SoftPrompt.from_tokens(model, CONTEXT, SEGMENTS)
    torch.manual_seed(5)
    with torch.no_grad():
        prompt.embeddings.add_(0.3 * torch.randn_like(prompt.embeddings)).copy_(prompt.embeddings.float())
    return Adapter(prompt.to_prefix(model, PrefixMetadata.of(model, method="ct-prompt")), prompt)


def update(model) -> Lora:
    """A LoRA update of all the modules that test-time training updates, with a B that is not zero."""
    lora = Lora(2, 3.0, lora_targets(model))
    with lora.injected(model) as wrapped:
        torch.manual_seed(6)
        for parameter in lora_parameters(wrapped).values():
            parameter.data = torch.randn_like(parameter).float().to(parameter.dtype)
        lora.capture(wrapped)
    return lora


def generate(model, ids, mask=None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]


@torch.no_grad()
def outputs(model):
    """Logits of a row, its greedy continuation, and that of a left-padded batch."""
    batch = pad_rows([ROW[0], ROW[0, :4]], "left")
    logits = model(input_ids=ROW).logits[:, -ROW.shape[1] :]  # peft returns those of a soft prompt, too
    return logits, generate(model, ROW), generate(model, *batch)


def assert_same(actual, expected, padded: bool = True) -> None:
    """padded: False leaves out the batch, where peft lets padding lie between the prefix and a row, which counts in its
    soft prompts' positions and in sliding windows."""
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(actual[1], expected[1])
    assert not padded or torch.equal(actual[2], expected[2])


def same_bits(a: KVPrefix, b: KVPrefix) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same(name, tmp_path):
    """A prefix under both names and a soft prompt, on every model class; then all read back, bit for bit."""
    model = make_model(name)
    prefix, prompted = tuned(model), tuned_prompt(model)
    for kind, adapter in (("cartridge", prefix), ("prefix-tuning", prefix), ("prompt-tuning", prompted)):
        own = adapter if adapter is prefix else adapter.prefix
        with own.attach(model):
            expected = outputs(model)
        export_peft(adapter, tmp_path / kind, kind)
        theirs = PeftModel.from_pretrained(make_model(name), tmp_path / kind)
        assert theirs.active_peft_config.peft_type == kind.upper().replace("-", "_")
        assert_same(outputs(theirs), expected, padded=kind != "prompt-tuning" and name not in WINDOWED)
        back = import_peft(tmp_path / kind, model)
        assert same_bits(back.prefix, own)
        assert torch.equal(back.prefix.segments, own.segments) and back.prefix.metadata == own.metadata


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_peft_computes_the_same_with_an_update_of_the_weights(name, tmp_path):
    model = make_model(name)
    prefix = KVPrefix.from_tokens(model, CONTEXT[:0], torch.tensor([0]), TOKENIZER, "ttt", {"lr": 0.1})
    adapter = Adapter(prefix, lora=update(model))
    plain = outputs(model)[0]
    with adapter.weights(model):
        expected = outputs(model)
    assert (expected[0] - plain).abs().max() > 1e-2
    export_peft(adapter, tmp_path, "lora")
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["fan_in_fan_out"] == (name == "gpt2")  # peft would correct it, with a warning
    assert_same(outputs(PeftModel.from_pretrained(make_model(name), tmp_path)), expected)
    back = import_peft(tmp_path, model)
    assert back.prefix.metadata == prefix.metadata
    with back.weights(model):
        assert_same(outputs(model), expected)
    assert torch.equal(outputs(model)[0], plain)


CONFIGS = {
    "cartridge": CartridgeConfig(num_virtual_tokens=7, num_frozen_tokens=2, task_type="CAUSAL_LM"),
    "prefix-tuning": PrefixTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM"),
    "projected prefix-tuning": PrefixTuningConfig(
        num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
    "prompt-tuning": PromptTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM"),
    "lora": LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], task_type="CAUSAL_LM"
    ),
    "rank-stabilised lora": LoraConfig(
        r=4, lora_alpha=5, use_rslora=True, target_modules=r".*mlp\.(up|down)_proj", task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_of_peft_load_into_ours(kind, name, tmp_path):
    """Made, changed and saved by peft alone."""
    torch.manual_seed(7)
    theirs = get_peft_model(make_model(name), CONFIGS[kind]).eval()
    torch.manual_seed(8)
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if "lora_" in path or "prompt_encoder" in path:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    expected = outputs(PeftModel.from_pretrained(make_model(name), tmp_path))
    model = make_model(name)
    assert (outputs(model)[0] - expected[0]).abs().max() > 1e-2
    adapter = import_peft(tmp_path, model, None if "lora" in kind else TOKENIZER)
    with adapter.weights(model), adapter.prefix.attach(model):
        assert_same(outputs(model), expected, padded=kind != "prompt-tuning" and name not in WINDOWED)
    adapter = import_peft(tmp_path, model, TOKENIZER)
    assert adapter.prefix.num_demonstrations == 0 and adapter.method.startswith("peft ")
    assert adapter.prefix.metadata.tokenizer_hash == tokenizer_hash(TOKENIZER)
    score = adapter.evaluate(model, TOKENIZER, ITEMS).gold_loss
    if "lora" in kind:  # rows start with BOS, as under the updated model itself
        with adapter.weights(model):
            assert score == run("zero-shot", model).adapter.evaluate(model, TOKENIZER, ITEMS).gold_loss


def test_an_older_file_of_peft(tmp_path):
    model = make_model("llama")
    torch.manual_seed(7)
    theirs = get_peft_model(model, CONFIGS["prefix-tuning"])
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert [path.name for path in tmp_path.glob("adapter_model*")] == ["adapter_model.bin"]
    with pytest.raises(PrefixFileError, match=r"adapter_model\.bin: a pickle, which can be made to harm who reads it"):
        import_peft(tmp_path, make_model("llama"))
    loaded = import_peft(tmp_path, make_model("llama"), allow_pickle=True).prefix
    assert torch.equal(loaded.values[0][0, :, 0].float(), theirs.get_prompt_embedding_to_save("default")[:, 16])


@pytest.mark.parametrize("method", ["ct-prompt", "ttt", "ttt+ct-kv", "ipt"])
def test_tuned_adapters(method, tmp_path, recwarn):
    """What methods leave: each part under its own kind, and the kind that is taken unasked."""
    model = make_model("llama")
    adapter = run(method, model).adapter
    if adapter.lora is not None:
        with pytest.raises(ValueError, match="kind must be given for an adapter with a LoRA update"):
            export_peft(adapter, tmp_path / "unsaid")
        assert not (tmp_path / "unsaid").exists()
        export_peft(adapter, tmp_path / "lora", "lora")
        export_peft(adapter, tmp_path / "prefix", "cartridge")
        base = PeftModel.from_pretrained(make_model("llama"), tmp_path / "lora").merge_and_unload()
        theirs = PeftModel.from_pretrained(base, tmp_path / "prefix")
    else:
        export_peft(adapter, tmp_path / "prompt")
        theirs = PeftModel.from_pretrained(make_model("llama"), tmp_path / "prompt")
        assert theirs.active_peft_config.peft_type == "PROMPT_TUNING"
    with adapter.weights(model), adapter.prefix.attach(model):
        expected = outputs(model)
    torch.testing.assert_close(outputs(theirs)[0], expected[0], rtol=1e-5, atol=1e-5)  # peft rounds to fp32
    words = [str(w.message) for w in recwarn if "in words" in str(w.message)]
    assert bool(words) == (method == "ipt")


def test_half_precision(tmp_path):
    """An fp32 prefix of a bf16 model: the same rounding on both sides."""
    model = make_model("llama", torch.bfloat16)
    prefix = KVPrefix.from_tokens(model, CONTEXT, SEGMENTS)
    export_peft(prefix, tmp_path)
    theirs = PeftModel.from_pretrained(make_model("llama", torch.bfloat16), tmp_path)
    with torch.no_grad(), prefix.attach(model):
        own = model(ROW).logits
        torch.testing.assert_close(theirs(input_ids=ROW).logits, own, rtol=0.05, atol=0.05 * own.abs().max().item())


# positions


def shorter(prefix: KVPrefix) -> KVPrefix:
    """Without its first three tokens; rows stay where they were."""
    keys, values = ([x[:, 3:] for x in layers] for layers in (prefix.keys, prefix.values))
    return KVPrefix(keys, values, torch.tensor([0, 8]), prefix.first_position, prefix.metadata)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_prefixes_whose_rows_begin_elsewhere(name, tmp_path):
    """peft's rows begin at position P, so that keys are moved, to within the fp32 of the rotation's angles."""
    model = make_model(name)
    prefix = shorter(tuned(model))
    with prefix.attach(model):
        expected = outputs(model)
    with pytest.raises(ValueError, match="begin at position 11, those of peft behind its 8 tokens: give the model"):
        export_peft(prefix, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    export_peft(prefix, tmp_path, model=model)
    actual = outputs(PeftModel.from_pretrained(make_model(name), tmp_path))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[1], expected[1])


def test_prefixes_that_cannot_be_moved(tmp_path):
    model = make_model("gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel adds learned positions"):
        export_peft(shorter(tuned(model)), tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


# what is refused


def test_exports_that_are_refused(tmp_path):
    model = make_model("llama")
    prefix = tuned(model)
    uneven = KVPrefix(
        [prefix.keys[0], prefix.keys[1][:1]], [prefix.values[0], prefix.values[1][:1]], SEGMENTS, 11, prefix.metadata
    )
    empty = KVPrefix.from_tokens(model, CONTEXT[:0], torch.tensor([0]))
    for adapter, kind, message in (
        (uneven, None, r"one tensor, but this prefix has layers of shapes \(1, 11, 8\), \(2, 11, 8\)"),
        (empty, None, "is empty, which peft cannot load"),
        (prefix, "lora", r"this adapter \(icl\) has no LoRA update"),
        (prefix, "prompt-tuning", r"this adapter \(icl\) has no soft prompt"),
        (prefix, "bitfit", "kind must be one of cartridge, .* got 'bitfit'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_peft(adapter, tmp_path / "out", kind)
    with pytest.raises(TypeError, match="must be an Adapter or a KVPrefix, got dict"):
        export_peft({}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_adapter(tmp_path, full_disk):
    model = make_model("llama")
    prefix = tuned(model)
    export_peft(prefix, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        export_peft(shorter(prefix), tmp_path, "prefix-tuning", model)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def edited(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_imports_that_are_refused(tmp_path):
    model = make_model("llama")
    export_peft(tuned(model), tmp_path / "a")

    def refused(message, folder="a", of=model, **changes):
        edited(tmp_path / folder, **changes)
        with pytest.raises(PrefixFileError, match=message):
            import_peft(tmp_path / folder, of)

    refused(
        "this LlamaForCausalLM .* has head_dim 16 instead of 8, num_attention_heads 2 instead of 4",
        of=make_model("llama", num_attention_heads=2),
    )
    weights = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as peft writes it, without what it was exported with
    refused("num_layers is 4, LlamaForCausalLM needs 3", num_layers=4)
    refused(r"prompt_embeddings must be floating \[7, columns\]", num_layers=3, num_virtual_tokens=7)
    refused("type IA3 cannot be imported; known are CARTRIDGE", peft_type="IA3")
    weights.write_bytes(b"half")
    refused(r"adapter_model\.safetensors: damaged or cut off", peft_type="CARTRIDGE")
    weights.unlink()
    refused(r"adapter_model\.safetensors: no such file")
    (tmp_path / "a" / "adapter_config.json").write_text("[")
    with pytest.raises(PrefixFileError, match=r"adapter_config\.json: damaged: its description is not"):
        import_peft(tmp_path / "a", model)
    with pytest.raises(PrefixFileError, match=r"adapter_config\.json: no such file; a peft adapter is a local folder"):
        import_peft(tmp_path, model)

    get_peft_model(make_model("llama"), CONFIGS["lora"]).save_pretrained(tmp_path / "lora")
    refused("LoRA with use_dora = True is more than A and B", "lora", use_dora=True)
    refused(
        "init_lora_weights = 'pissa' changed the model's weights", "lora", use_dora=False, init_lora_weights="pissa"
    )
    refused(r"lora_A\.weight must have shape \(3, 40\), got \(2, 40\)", "lora", init_lora_weights=True, r=3)
    edited(tmp_path / "lora", r=2, base_model_name_or_path="some/other")
    model.name_or_path = "this/model"
    with pytest.warns(UserWarning, match="made for model 'some/other', loaded for 'this/model'"):
        import_peft(tmp_path / "lora", model)


def test_from_the_shell(files, tmp_path, capsys):
    """There and back: the demonstrations come along, and what misses or cannot be is said in one line."""
    model = ["--model", f"{files}/model"]
    tune = ["tune", *model, "--train", f"{files}/train.jsonl", "--out", f"{tmp_path}/run", "--epochs", "1"]
    assert cli.run(tune) == 0
    capsys.readouterr()
    saved = f"{tmp_path}/run/prefix"
    assert cli.run(["export", "--adapter", saved, "--out", f"{tmp_path}/peft"]) == 0
    assert cli.run(["import", *model, "--adapter", f"{tmp_path}/peft", "--out", f"{tmp_path}/back"]) == 0
    assert "back: 65 tokens" in capsys.readouterr().out
    there, back = (KVPrefix.from_pretrained(folder) for folder in (saved, tmp_path / "back"))
    assert same_bits(there, back) and torch.equal(there.segments, back.segments)
    assert cli.run(["export", "--adapter", saved]) == 2
    assert capsys.readouterr().err == "ctkernels: error: out is required: a folder (--out)\n"
    assert cli.run(["export", "--adapter", saved, "--out", f"{tmp_path}/lora", "--kind", "lora"]) == 2
    assert "has no LoRA update" in capsys.readouterr().err and not (tmp_path / "lora").exists()


def test_offsets_of_options_come_back(tmp_path):
    """In the header of each kind; those of an adapter of two parts belong to neither."""
    model = make_model("llama")
    offsets = Offsets("batch", "mean", {"warm": 0.5, "cold": -0.25})
    empty = KVPrefix.from_tokens(model, CONTEXT[:1], torch.tensor([1]))
    adapters = {
        "cartridge": Adapter(tuned(model), offsets=offsets),
        "prompt-tuning": replace(tuned_prompt(model), offsets=offsets),
        "lora": Adapter(empty, lora=update(model), offsets=offsets),
    }
    for kind, adapter in adapters.items():
        export_peft(adapter, tmp_path / kind, kind)
        assert import_peft(tmp_path / kind, model).offsets == offsets
    both = Adapter(tuned(model), lora=update(model), offsets=offsets)
    for kind in ("lora", "cartridge"):
        with pytest.warns(UserWarning, match="belong to both parts of this adapter and are left out"):
            export_peft(both, tmp_path / "both", kind)
        assert import_peft(tmp_path / "both", model).offsets is None


def test_a_changed_value_is_found_by_the_checksum(tmp_path):
    """In what this library exported; adapters of peft, and exports of earlier versions, have none and are read."""
    model = make_model("llama")
    export_peft(tuned(model), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(PrefixFileError, match=r"adapter_model\.safetensors: damaged: .* \(checksum\)"):
        import_peft(tmp_path, model)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["checksum"]
    save_file(tensors, path, header)
    assert import_peft(tmp_path, model).prefix.length == len(CONTEXT)
