"""The method table, its settings, and what all methods have in common: results, resuming, errors."""

import importlib
import pickle
import pkgutil
import re
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pytest
import torch

from ctkernels import tuning
from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS
from ctkernels.tuning import methods
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import encode_context
from ctkernels.tuning.hf.encode import encode_tokens
from ctkernels.tuning.methods import METHODS, PRESETS, Method, get_method
from ctkernels.tuning.methods import settings as all_settings
from ctkernels.tuning.methods.ct_kv import CtKvOptions
from ctkernels.tuning.methods.settings import SETTINGS, TrainSettings
from ctkernels.tuning.methods.table import TABLE
from ctkernels.tuning.methods.ttt import TttOptions
from ctkernels.tuning.methods.tune import tune, with_objective
from ctkernels.tuning.train.masks import Dropout
from ctkernels.tuning.train.options import RENAMED, LoopOptions, Options, choices, either, meanings, type_hints
from tests.tuning.runs import ITEMS, NAMES, TOKENIZER, TRAINING, assert_same_bits, run


def test_table():
    """Every method that a file of the package defines is one row; those that train take the loop's settings."""
    modules = [importlib.import_module(f"{methods.__name__}.{m.name}") for m in pkgutil.iter_modules(methods.__path__)]
    defined = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, Method)}
    assert sorted(defined) == sorted(map(id, TABLE)) and len(METHODS) == len(TABLE)
    assert all(name == method.name and method.summary for name, method in METHODS.items())
    assert all(issubclass(m.options, LoopOptions) == (m.trains != "nothing") for m in TABLE)


def test_every_public_name_of_the_package_is_there():
    tables = ("METHODS", "PRESETS")
    assert all(getattr(tuning, name).__name__ == name for name in tuning.__all__ if name not in tables)
    assert tuning.METHODS is METHODS
    with pytest.raises(AttributeError, match="has no attribute 'tun'"):
        tuning.tun  # noqa: B018


def test_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"must be one of zero-shot, .*, cpt, got 'ctkv'; did you mean 'ct-kv'"):
        get_method("ctkv")


def test_every_setting_is_read_by_a_method_and_documented():
    names = {field.name for field in fields(TrainSettings)}
    assert set().union(*(method.reads for method in METHODS.values())) == names == {*SETTINGS}
    assert all(re.search(rf"^ +{name}: ", TrainSettings.__doc__, re.MULTILINE) for name in names)
    for method in TABLE:
        assert method.reads == {name for name, setting in SETTINGS.items() if method.name in setting.methods}
        # a base with no default of its own must not bring back the neutral one
        assert all(f.default == getattr(method.options, f.name) for f in fields(method.options))


def test_a_setting_is_declared_once_and_says_what_it_means(monkeypatch):
    @dataclass(frozen=True)
    class Mute(Options):
        """Nothing is said.

        Args:
            loud: said
                in two lines.
        """

        loud: int = 1
        silent: int = 2

    @dataclass(frozen=True)
    class Twice(Options):
        """Declares what masks declare.

        Args:
            drop_p: something else.
        """

        drop_p: float = 0.5

    assert meanings(Mute) == {"loud": "said in two lines."}
    for options, message in (
        (Mute, "the docstring of Mute must say under Args: what silent means"),
        (Twice, "drop_p is declared twice, by Dropout and Twice"),
    ):
        monkeypatch.setattr(all_settings, "TABLE", (*TABLE, Method("new", "", options, None)))
        with pytest.raises(TypeError, match=message):
            all_settings._settings()


def test_defaults_and_overrides():
    chosen = get_method("ct-kv").settings(lr=0.5)
    assert (chosen.lr, chosen.epochs, chosen.drop_p, chosen.leave_one_out) == (0.5, 25, 0.05, "self")
    assert get_method("ct-prompt").settings().batch_rows == 4 and chosen.batch_rows is None
    both = get_method("ttt+ct-kv").settings()
    assert (both.lr, both.epochs, both.batch_rows, both.ttt_lr, both.ttt_epochs) == (3e-3, 8, None, 1e-4, 8)
    starts = {name: method.settings().start for name, method in METHODS.items() if "start" in method.reads}
    assert starts == {"ct-kv": "context", "ttt+ct-kv": "context"} | dict.fromkeys(
        ("prompt-tuning", "prefix-tuning", "meta-prefix", "ipt"), "vocabulary"
    )


def test_settings_of_any_class_become_the_methods_own():
    ct_kv, icl = get_method("ct-kv"), get_method("icl")
    own = ct_kv.settings(pull=0.5)
    assert ct_kv.accept(own) is own
    plain = ct_kv.accept(TrainSettings(lr=0.5))  # its neutral values, rather than the method's own
    assert plain == CtKvOptions(lr=0.5, drop_p=0.0, leave_one_out="none")
    assert get_method("ct-prompt").accept(ct_kv.settings(drop_p=0.3)).drop_p == 0.3
    assert get_method("ttt").accept(TrainSettings()) == TttOptions(lr=3e-3, epochs=25, batch_rows=None)
    with pytest.raises(ValueError, match=r"ct-prompt does not read pull, got 0\.5"):
        get_method("ct-prompt").accept(own)
    with pytest.raises(ValueError, match=r"ttt does not read drop_p, got 0\.05"):  # ct-kv's own default is not neutral
        get_method("ttt").accept(ct_kv.settings())
    with pytest.raises(ValueError, match="icl does not read epochs, got 3"):
        icl.accept(TrainSettings(epochs=3))
    with pytest.raises(ValueError, match="icl does not read 'epochs'; it reads backend, max_tokens, score, seed"):
        icl.settings(epochs=3)
    with pytest.raises(ValueError, match=r"start of prefix-tuning must be one of vocabulary, .*, got 'context'"):
        get_method("prefix-tuning").accept(TrainSettings())
    with pytest.raises(TypeError, match="settings must be CtKvOptions or TrainSettings, got dict"):
        ct_kv.accept({"lr": 0.5})
    with pytest.raises(TypeError, match="hidden"):  # the name of an earlier version
        TrainSettings(hidden=8)
    assert not RENAMED.keys() & SETTINGS.keys() and {*RENAMED.values()} <= SETTINGS.keys()
    given = TrainSettings(lora_targets=["q_proj"], drop_p=0.1)
    assert pickle.loads(pickle.dumps(given)) == given and given.lora_targets == ("q_proj",)


def test_every_check_of_its_parts_runs():
    """Also where a class has a check of its own, and in the one class of all settings."""
    for kind in (get_method("ttt+ct-kv").options, TrainSettings):
        for name, value in (("seed", -1), ("epochs", -1), ("drop_p", 1.0), ("lora_rank", 0), ("ttt_epochs", -1)):
            with pytest.raises(ValueError, match=f"{name} must be"):
                kind(**{name: value})
    assert Dropout(drop_p=0.5).drop_p == 0.5
    assert choices(type_hints(TrainSettings)["start"])[-1] == "uniform" and choices(int | None) == ()
    assert choices(Literal["a", "b"] | None) == ("a", "b", None)
    assert (either(["a"]), either(["a", "b"]), either(["a", "b", "c"])) == ("a", "a or b", "a, b or c")


def test_settings_that_a_method_does_not_read_are_refused():
    """Would catch a comparison of settings that make no difference."""
    with pytest.raises(ValueError, match=r"prefix-tuning does not read 'leave_one_out'; it reads .*prompt_tokens"):
        get_method("prefix-tuning").settings(leave_one_out="none")
    with pytest.raises(ValueError, match=r"ttt does not read drop_p, got 0\.3"):
        tune(make_model("llama"), TOKENIZER, DEMONSTRATIONS, "ttt", TrainSettings(drop_p=0.3))
    with pytest.raises(ValueError, match=r"start of ct-kv must be one of context, .*, got 'vocabulary'"):
        get_method("ct-kv").settings(start="vocabulary")


def test_the_loss_where_none_is_given():
    """Would catch: options trained where a demonstration has none, a given objective or a preset that is replaced."""
    ct_kv, free = get_method("ct-kv"), [*DEMONSTRATIONS[1:], Demonstration("dusk", "late")]
    found = {
        "all have options": with_objective(ct_kv.settings(), DEMONSTRATIONS),
        "one has none": with_objective(ct_kv.settings(), free),
        "given": with_objective(ct_kv.settings(objective="mixed"), DEMONSTRATIONS),
        "preset": with_objective(ct_kv.settings("nlp-lr"), DEMONSTRATIONS),
    }
    assert [s.objective for s in found.values()] == ["options", "answers", "mixed", "answers"]
    untrained = get_method("icl").settings()
    assert with_objective(untrained, DEMONSTRATIONS) is untrained
    for name, method in METHODS.items():
        if method.trains != "nothing":
            assert method.settings().objective is None, name


def test_presets_are_the_papers_table():
    ct_kv, both = get_method("ct-kv"), get_method("ttt+ct-kv")
    found = {name: (s.lr, s.epochs, s.drop_p) for name in PRESETS for s in [ct_kv.settings(name)]}
    assert found == {
        "nlp-lr": (1e-3, 250, 0.05),
        "mmlu": (1e-3, 20, 0.1),
        "bbh": (1e-3, 16, 0.1),
        "arc": (3e-3, 200, 0.1),
    }
    chosen = both.settings("arc", lr=1.0)
    assert (chosen.lr, chosen.epochs, chosen.ttt_steps, chosen.ttt_lr, chosen.lora_rank) == (1.0, 50, 200, 1e-4, 64)
    assert get_method("prefix-tuning").settings("bbh").lr == get_method("ct-prompt").settings("bbh").lr == 3e-4
    assert get_method("icl").settings("bbh") == get_method("icl").settings()
    with pytest.raises(ValueError, match="cpt has no preset 'arc'; the methods with one are ct-kv, ct-prompt, prefix-"):
        get_method("cpt").settings("arc")
    for preset, of_methods in PRESETS.items():
        for name, values in of_methods.items():  # every value of a preset is one that its method reads
            assert values.items() <= asdict(get_method(name).settings(preset)).items()
            assert (values["objective"], values["reduction"]) == ("answers", "tokens")  # the authors' loss
    with pytest.raises(ValueError, match="preset must be one of nlp-lr, mmlu, bbh, arc, got 'mml'"):
        ct_kv.settings("mml")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"drop_p": 1.0}, r"drop_p must be in \[0, 1\), got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None, got 0.0"),
        ({"seed": -1}, r"seed must be in \[0, 2147483647\], got -1"),
        ({"layout": "ragged"}, "layout must be packed or padded, got 'ragged'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"leave_one_out": True}, "leave_one_out must be none, self, suffix or power, got True"),
        ({"rank": 0}, "rank must be at least 1, or None, got 0"),
        ({"drop_from": -1}, "drop_from must be at least 0, got -1"),
        ({"pull": -0.1}, "pull must be at least 0, got -0.1"),
        ({"eta": 0.0}, r"eta must be in \(0, 1\], got 0.0"),
        ({"answers": "first"}, "answers must be all or last, got 'first'"),
        ({"start": "here"}, "start must be context, separate, .*, normal or uniform, got 'here'"),
        ({"mlp_width": 0}, "mlp_width must be at least 1, or None, got 0"),
        ({"pooled_tokens": 0}, "pooled_tokens must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**setting)


def test_every_epoch_and_seed_draws_anew():
    seeds = {TrainSettings(seed=seed).dropout_seed(epoch) for seed in (0, 1, 2**31 - 1) for epoch in range(300)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_leaves_the_model_as_it_was(name):
    model = make_model("llama", torch.float32)
    model.train()
    model.model.embed_tokens.requires_grad_(True)
    before = {key: p.clone() for key, p in model.named_parameters()}
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    training, attributes = [m.training for m in model.modules()], set(vars(model))
    result = run(name, model)
    result.adapter.evaluate(model, TOKENIZER, ITEMS)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert all(torch.equal(p, before[key]) and p.grad is None for key, p in model.named_parameters())
    assert [m.training for m in model.modules()] == training and set(vars(model)) == attributes


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["ct-prompt", "ttt", "ttt+ct-kv"])
def test_activation_checkpointing_changes_nothing(name, use_reentrant):
    """Would catch: a graph cut at the first checkpoint, hooks that are left on the model."""
    expected = run(name, make_model("llama"))
    model = make_model("llama")
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    hooks = [len(m._forward_hooks) for m in model.modules()]
    result = run(name, model)
    assert [r.loss for r in result.history] == pytest.approx([r.loss for r in expected.history], abs=1e-12)
    assert result.history[-1].loss != result.history[0].loss
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_an_update_of_a_low_precision_model_is_trained_in_full_precision():
    model = make_model("llama", torch.bfloat16)
    result = run("ttt+ct-kv", model, options={"lr": 1e-6})
    assert {x.dtype for x in result.adapter.lora.tensors.values()} == {torch.float32}
    assert result.adapter.evaluate(model, TOKENIZER, ITEMS).items == 2


@pytest.mark.parametrize("name", TRAINING)
def test_every_method_learns_its_demonstrations(name):
    model = make_model("llama", torch.float32)
    lr = {"cpt": 1e-2, "prompt-tuning": 5e-2, "ipt": 5e-2}.get(name, 3e-2)
    options = {"epochs": 15, "lr": lr} | ({"radius": 20.0} if name == "cpt" else {})
    losses = [r.loss for r in run(name, model, options=options).history]
    assert losses[-1] < 0.9 * losses[0]


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in TRAINING),
        *((name, {"batch_rows": 2}) for name in ("ct-kv", "ct-prompt", "ttt")),
        ("ct-kv", {"pull": 1.0, "fisher": True}),
        ("ct-kv", {"ema": 0.6}),
        ("ct-kv", {"rank": 2, "start": "permuted", "front_tokens": 2, "leave_one_out": "power"}),
        ("prefix-tuning", {"mlp_width": 4}),
        ("prompt-tuning", {"mlp_width": 4}),
    ],
    ids=str,
)
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, name, options):
    model = make_model("llama", torch.float32)
    whole = run(name, model, options=options)
    for stop in (2, 4) if name == "ttt+ct-kv" else (1, 2):  # epochs that this process runs before it stops
        seen = []

        def on_epoch(record, module, stop=stop, seen=seen):
            seen.append(record)
            if len(seen) == stop:
                raise Stopped

        with pytest.raises(Stopped):
            run(
                name,
                model,
                options=options,
                checkpoint_dir=tmp_path,
                checkpoint_every=1,
                resume=True,
                on_epoch=on_epoch,
            )
    resumed = run(name, model, options=options, checkpoint_dir=tmp_path, checkpoint_every=1, resume=True)
    assert_same_bits(resumed.adapter, whole.adapter)
    strip = [{k: v for k, v in asdict(r).items() if k != "seconds"} for r in resumed.history]
    assert strip == [{k: v for k, v in asdict(r).items() if k != "seconds"} for r in whole.history]


def test_deep_thinking_by_hand():
    """Each round encodes the demonstrations at their own positions behind the cache and moves it by eta."""
    model = make_model("llama")
    tokens = encode_context(TOKENIZER, DEMONSTRATIONS).input_ids
    prefix = KVPrefix.from_tokens(model, tokens, torch.tensor([0]))
    eta = 0.3
    for _ in range(2):
        length = len(tokens)
        cache = _stock_cache(model, tokens, [k[None] for k in prefix.keys], [v[None] for v in prefix.values])
        keys = [(1 - eta) * k + eta * c.keys[0, :, length:] for k, c in zip(prefix.keys, cache.layers, strict=True)]
        values = [
            (1 - eta) * v + eta * c.values[0, :, length:] for v, c in zip(prefix.values, cache.layers, strict=True)
        ]
        prefix = KVPrefix(keys, values, torch.tensor([0]), length, prefix.metadata)
    result = run("deep-thinking", model, options={"rounds": 2, "eta": eta})
    for actual, expected in zip(result.prefix.parameters(), prefix.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert result.prefix.first_position == len(tokens) and result.history == []
    one, icl = run("deep-thinking", model, options={"rounds": 1, "eta": 1.0}).prefix, run("icl", model).prefix
    assert not torch.equal(one.values[2], icl.values[2])
    torch.testing.assert_close(one.values[0], icl.values[0])  # the first layer's values read nothing
    with pytest.raises(ValueError, match="at the same positions, which BloomForCausalLM does not have"):
        run("deep-thinking", make_model("bloom"))


@torch.no_grad()
def _stock_cache(model, tokens, keys, values):
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, layer)
    length = len(tokens)
    mask = torch.cat((torch.ones(length, length), torch.ones(length, length).tril()), dim=1).bool()[None, None]
    model(tokens[None], attention_mask=mask, position_ids=torch.arange(length)[None], past_key_values=cache)
    return cache


def test_too_few_demonstrations_for_each_method():
    model = make_model("llama", torch.float32)
    for name in NAMES[1:]:
        with pytest.raises(DataError, match=f"{re.escape(name)} needs (at least|demonstrations)"):
            run(name, model, [])
    with pytest.raises(DataError, match="ipt needs at least 2 demonstrations, got 1"):
        run("ipt", model, DEMONSTRATIONS[:1])
    assert run("zero-shot", model, []).prefix.length == 1  # BOS
    adaptive = {"leave_one_out_from": 4}  # with fewer, a row may see its own demonstration
    assert len(run("ct-kv", model, DEMONSTRATIONS[:1], adaptive).history) == 3


@pytest.mark.parametrize(
    "name", ["ipt", "ct-prompt", "ct-kv", "ttt", "ttt+ct-kv", "deep-thinking", "cpt", "prefix-tuning"]
)
def test_what_the_context_is_too_short_for_is_refused_by_name_before_the_model_runs(name):
    model = make_model("llama", torch.float32)
    model.model.layers[0].register_forward_pre_hook(_fail)
    long = [Demonstration("a" * 29 + str(i), "b" * 8, source=f"train.jsonl:{i}") for i in range(1, 6)]
    options = {"prompt_tokens": 39, "epochs": 1} if name == "prefix-tuning" else {}
    if name == "prefix-tuning":
        long = [Demonstration("a" * 90, "b" * 8, source=f"train.jsonl:{i}") for i in range(1, 6)]
    with pytest.raises(
        DataError, match=r"tokens, more than the model's context of 128|train\.jsonl:1: a row of .* 128"
    ):
        run(name, model, long, options)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"top_layers": 4}, "top_layers must be at most the model's 3 layers"),
        ({}, {"frozen_tokens": 110}, r"frozen_tokens must be less than the prefix's \d+ tokens, got 110"),
        ({}, {"front_tokens": 50}, "a row of .* behind a prefix of .* exceeds the model's context of 128"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            {"start": "pooled"},
            "start='pooled' moves keys to other positions",
        ),
    ],
)
def test_ct_kv_after_ttt_is_refused_before_ttt_is_trained(model, options, message):
    with pytest.raises(ValueError, match=message):
        run("ttt+ct-kv", make_model("llama", torch.float32, **model), options=options, on_epoch=_fail)


def _fail(*args):
    raise AssertionError("the model ran")


def test_tokens_behind_a_prefix_take_its_positions():
    model = make_model("gpt2")
    whole, _ = encode_tokens(model, torch.arange(4, 14))
    front = KVPrefix.from_tokens(model, torch.arange(4, 8), torch.tensor([0]))
    behind, _ = encode_tokens(model, torch.arange(8, 14), behind=front)
    for a, b in zip(whole, behind, strict=True):
        torch.testing.assert_close(a[:, 4:], b, rtol=0, atol=1e-9)
