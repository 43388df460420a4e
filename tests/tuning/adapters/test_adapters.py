"""Adapters: saved, read back, applied to the model, and the start of another task; LoRA updates of every family."""

import pytest
import torch

from ctkernels.testing.models import MODELS, make_model
from ctkernels.testing.tasks import BOS, DEMONSTRATIONS, SPACE, ids
from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.file import PrefixFileError, read_file, write_file
from ctkernels.tuning.adapters.lora import Lora, lora_parameters, lora_targets
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.formats import PairEncoder
from ctkernels.tuning.hf.fingerprint import weights_fingerprint
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.train.learners import LoraLearner
from tests.tuning.runs import ITEMS, NAMES, TOKENIZER, assert_same_bits, run


@pytest.mark.parametrize("name", NAMES)
def test_saved_adapters_score_as_before(tmp_path, name):
    model = make_model("llama", torch.float32)
    adapter = run(name, model).adapter
    scores = adapter.evaluate(model, TOKENIZER, ITEMS)
    (tmp_path / "prompt-ideas.safetensors").touch()  # the user's own
    adapter.save_pretrained(tmp_path)
    loaded = Adapter.from_pretrained(tmp_path, model, TOKENIZER)
    assert_same_bits(loaded, adapter)
    assert loaded.method == name and loaded.demonstrations == adapter.demonstrations
    assert loaded.evaluate(model, TOKENIZER, ITEMS) == scores
    # saving another one over it leaves nothing of the old one
    run("icl", model).adapter.save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and Adapter.from_pretrained(tmp_path).lora is None


def test_weights_matter_to_the_scores():
    """Would catch an evaluation that forgets the LoRA update."""
    model = make_model("llama")
    adapter = run("ttt", model, options={"lr": 0.1}).adapter
    without = Adapter(adapter.prefix).evaluate(model, TOKENIZER, ITEMS).gold_loss
    assert abs(adapter.evaluate(model, TOKENIZER, ITEMS).gold_loss - without) > 1e-3


def test_a_prefix_read_without_its_weights_is_warned_about(tmp_path):
    model = make_model("llama", torch.float32)
    run("ttt", model).adapter.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="belongs to a LoRA update"):
        KVPrefix.from_pretrained(tmp_path, model)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["ttt", "ttt+ct-kv"])
def test_the_weights_of_an_adapter_are_those_without_its_update(tmp_path, name):
    """Would catch: the fingerprint of merged weights, which no model that is loaded has; one that is taken for the
    model's own afterwards."""
    model = make_model("llama", torch.float32)
    own = weights_fingerprint(model)
    adapter = run(name, model, options={"lr": 0.1}).adapter
    assert adapter.prefix.metadata.weights == own == weights_fingerprint(model)
    adapter.save_pretrained(tmp_path)
    Adapter.from_pretrained(tmp_path, model, TOKENIZER)
    with adapter.lora.merged(model):
        assert weights_fingerprint(model) != own
        Adapter.from_pretrained(tmp_path, model, TOKENIZER)
    assert weights_fingerprint(model) == own
    other = make_model("llama", torch.float32, seed=1)
    with pytest.raises(PrefixFileError, match="with other weights"):
        Adapter.from_pretrained(tmp_path, other, TOKENIZER)
    with pytest.warns(UserWarning, match="with other weights"):
        Adapter.from_pretrained(tmp_path, other, TOKENIZER, allow_other_weights=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"rank": 2, "alpha": 2.0}}, "damaged: 'targets' is missing"),
        ({"lora": None}, "damaged: TypeError"),
        ({"prompt": {"segments": [0]}}, "damaged: 'prompt' is missing"),
        ({"demonstrations": [{"input": "x"}]}, "damaged: TypeError"),
        ({"demonstrations": [{"input": "x", "output": " "}]}, "output must not be blank"),
    ],
    ids=str,
)
def test_damaged_adapters_are_refused(tmp_path, change, message):
    model = make_model("llama", torch.float32)
    run("ttt", model).adapter.save_pretrained(tmp_path)
    path, description, tensors = read_file(tmp_path, "adapter")
    write_file(path, "adapter", {**description, **change}, tensors)
    with pytest.raises(PrefixFileError, match=rf"adapter\.safetensors: {message}"):
        Adapter.from_pretrained(tmp_path, model)


def test_an_update_without_its_description_is_refused(tmp_path):
    """Would catch an update of the weights that is lost without a word."""
    run("ttt", make_model("llama", torch.float32)).adapter.save_pretrained(tmp_path)
    path, description, tensors = read_file(tmp_path, "adapter")
    del description["lora"]
    write_file(path, "adapter", description, tensors)
    with pytest.raises(PrefixFileError, match=r"holds a tensor lora\.base_model\..*, of which nothing is known"):
        Adapter.from_pretrained(tmp_path)


def interrupted(*_args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["pathlib.Path.write_bytes", "os.fsync", "pathlib.Path.replace"])
def test_interrupted_saves_leave_the_old_adapter(tmp_path, monkeypatch, step):
    """Would catch parts of two adapters read as one, and an update of the weights that is lost in silence."""
    model = make_model("llama", torch.float32)
    update = Lora(2, 2.0, ("q_proj",))
    with update.injected(model) as wrapped:
        update.capture(wrapped)
    prefixes = [KVPrefix.from_tokens(model, torch.tensor(ids(text)), torch.tensor([0])) for text in ("ice", "sun")]
    plain, updated = Adapter(prefixes[0]), Adapter(prefixes[1], lora=update)
    for old, new in ((plain, updated), (updated, plain)):
        old.save_pretrained(tmp_path)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(step, interrupted)
            new.save_pretrained(tmp_path)
        assert_same_bits(Adapter.from_pretrained(tmp_path, model), old)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


@pytest.mark.parametrize("name", MODELS)
def test_lora_finds_its_modules_in_every_family(name):
    model = make_model(name)
    targets = lora_targets(model)
    tokens = torch.tensor([[5, 9, 12]])
    before = model(tokens).logits
    lora = Lora(2, 4.0, targets)
    with lora.injected(model) as wrapped:
        assert torch.equal(model(tokens).logits, before)  # B is zero
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if ".lora_B" in key:
                    parameter.normal_(0, 0.1)
        changed = model(tokens).logits
        lora.capture(wrapped)
    assert (changed - before).abs().max() > 1e-3
    with lora.merged(model):
        torch.testing.assert_close(model(tokens).logits, changed, rtol=0, atol=1e-5)
    assert torch.equal(model(tokens).logits, before)


def test_the_generators_of_gpus_are_left_alone(monkeypatch):
    """The update is drawn on the CPU, whose generator is put back; those of GPUs are not."""
    model, seeded, drawn = make_model("llama"), [], []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.random.get_rng_state()
    for seed in (5, 5, 6):
        with Lora(2, 2.0, ("q_proj",), seed).injected(model) as wrapped:
            drawn.append(next(iter(lora_parameters(wrapped).values())).detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not seeded and torch.equal(torch.random.get_rng_state(), state)


def test_lora_errors():
    model = make_model("llama")
    with pytest.raises(ValueError, match="lora_targets: LlamaForCausalLM has no module named c_attn"):
        run("ttt", model, options={"lora_targets": ("q_proj", "c_attn")})
    with Lora(2, 2.0, ("q_proj",)).injected(model), pytest.raises(ValueError, match="carries a peft adapter already"):
        run("ttt", model)


def test_transfer_of_updates_and_prefixes():
    model = make_model("llama")
    still = {"epochs": 1, "lr": 1e-12}
    lora = run("ttt", model, DEMONSTRATIONS[3:], {"lr": 0.1}).adapter
    again = run("ttt", model, DEMONSTRATIONS[:3], still, start_from=lora).adapter
    for name, tensor in lora.lora.tensors.items():
        torch.testing.assert_close(again.lora.tensors[name], tensor, rtol=0, atol=1e-9)
    prefix = run("prefix-tuning", model, DEMONSTRATIONS[3:], {"lr": 0.1}).adapter
    before = [p.clone() for p in prefix.prefix.parameters()]
    run("prefix-tuning", model, DEMONSTRATIONS[:3], {"lr": 0.1}, start_from=prefix)
    assert all(torch.equal(p, b) for p, b in zip(prefix.prefix.parameters(), before, strict=True))
    again = run("prefix-tuning", model, DEMONSTRATIONS[:3], still, start_from=prefix).adapter
    for a, b in zip(again.prefix.parameters(), prefix.prefix.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert again.prefix.num_demonstrations == 0


@pytest.mark.parametrize(
    ("name", "origin", "message"),
    [
        ("icl", "ct-kv", "start_from must be None for icl"),
        ("prompt-tuning", "ct-kv", "made by ct-kv and has no prompt for prompt-tuning"),
        ("ttt", "ct-kv", "made by ct-kv and has no lora for ttt"),
        ("ct-kv", "ttt", "made by ttt: its prefix belongs to other weights"),
    ],
)
def test_adapters_that_a_method_cannot_start_from(name, origin, message):
    model = make_model("llama", torch.float32)
    with pytest.raises(ValueError, match=message):
        run(name, model, start_from=run(origin, model).adapter)


def test_an_adapter_of_another_model_is_refused():
    other = run("prompt-tuning", make_model("gpt2")).adapter
    with pytest.raises(ValueError, match=r"start_from was made for GPT2LMHeadModel .*; this Llama.* has model_type"):
        run("prompt-tuning", make_model("llama"), start_from=other)


@pytest.mark.parametrize("answers", ["all", "last"])
def test_an_in_context_sequence_can_teach_where_to_stop(answers):
    """Labels are the answers and the delimiter behind each; the sequence ends with what predicts the last of them."""
    two, model = DEMONSTRATIONS[:2], make_model("llama")
    chosen = get_method("ttt").settings(learn_stop=True, answers=answers)
    with Lora(2, 2.0, ("q_proj",)).injected(model) as wrapped:
        row = LoraLearner(model, wrapped, PairEncoder(TOKENIZER), two, chosen).rows(0)[1]
    assert row.tokens == (BOS, *ids("red brick warm snow cold"))
    assert row.answers == ((ids("warm cold ") if answers == "all" else ids("cold ")),)
    whole = (*row.tokens, SPACE)
    assert tuple(whole[at + 1] for at in row.predicted_at) == row.answers[0]
