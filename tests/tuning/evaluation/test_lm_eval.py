"""The LM Evaluation Harness with a prefix attached, against the stock model on the concatenated context."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from functools import partial

import lm_eval.tasks
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager

from ctkernels.testing.models import make_model, tokens
from ctkernels.testing.tasks import BOS, DEMONSTRATIONS, char_tokenizer, ids, write_jsonl
from ctkernels.tuning import Adapter, KVPrefix, get_method, tune
from ctkernels.tuning.adapters.file import PrefixFileError
from ctkernels.tuning.evaluation.calibration import Offsets
from ctkernels.tuning.evaluation.lm_eval import NAME, PrefixLM

CONTEXT = torch.tensor(ids("red_brick_warm_snow_cold"))
SEGMENTS = torch.tensor([0, 14, 24])
TEXTS = [(" a log fire", " ok"), (" ice", " cold"), (" noon in july", " warm")]
SETTINGS = {"batch_size": 3, "device": "cpu"}
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: " {{{{input}}}}"
target_delimiter: " "
{rest}
"""


@pytest.fixture(scope="module")
def llama():
    return make_model("llama")


@pytest.fixture(scope="module")
def prefix(llama):
    return KVPrefix.from_tokens(llama, CONTEXT, SEGMENTS)


@pytest.fixture(scope="module")
def lm(llama, prefix):
    return PrefixLM(llama, prefix, tokenizer=char_tokenizer(), **SETTINGS)


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@torch.no_grad()
def direct(model, row, scored, context=CONTEXT):
    """Log-likelihood of the last `scored` tokens behind the context, and whether greedy decoding gives them."""
    sequence = torch.cat((context, torch.tensor(row)))
    logits = model(sequence[None]).logits[0, -scored - 1 : -1].log_softmax(-1)
    wanted = sequence[-scored:]
    return float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


def close(actual, wanted):
    return abs(actual - wanted) < 1e-7 * max(1, abs(wanted))  # the stock model's norms compute in fp32


def test_loglikelihood(llama, lm):
    """Rows of different lengths in one batch, so that there is padding; nothing of the model is left switched over."""
    pairs = [(context, answer) for context, _ in TEXTS for answer in (" ok", " cold", " warm")]
    results = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for (context, answer), (value, greedy) in zip(pairs, results, strict=True):
        wanted, wanted_greedy = direct(llama, ids(context + answer), len(answer))
        assert close(value, wanted) and greedy == wanted_greedy
        assert abs(value - direct(llama, ids(context + answer), len(answer), CONTEXT[:0])[0]) > 1e-3
    assert llama.config._attn_implementation == "sdpa"


def test_only_logits_of_a_requests_own_tokens(lm):
    with lm._attached():
        assert lm._model_call(tokens(2, 5)).shape == (2, 5, lm.model.config.vocab_size)


def test_an_empty_context(llama, lm):
    ((value, _),) = lm.loglikelihood(instances("loglikelihood", [("", "ok")]), disable_tqdm=True)
    assert close(value, direct(llama, (BOS, *ids("ok")), 2)[0])


def test_loglikelihood_rolling(llama, lm):
    texts = [(" a log fire",), (" ice",)]
    results = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    for (text,), value in zip(texts, results, strict=True):
        assert close(value, direct(llama, (BOS, *ids(text)), len(text))[0])


def test_rolling_in_windows(llama, prefix):
    """Longer texts than fit are cut into windows, each of which sees the prefix."""
    lm = PrefixLM(llama, prefix, tokenizer=char_tokenizer(), max_length=6, **SETTINGS)
    text = " noon in july"
    (value,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    row = (BOS, *ids(text))  # windows of 6 tokens; the last one is filled up with what came before
    wanted = [direct(llama, row[0:7], 6), direct(llama, row[6:13], 6), direct(llama, row[7:14], 1)]
    assert close(value, sum(x for x, _ in wanted))


def test_generate_until(llama, lm):
    """Greedy, from a batch padded on the left, up to a stop word."""
    settings = {"until": ["zz"], "max_gen_toks": 5, "do_sample": False}
    requests = instances("generate_until", [(context, settings) for context, _ in TEXTS])
    tokenizer = char_tokenizer()
    answers = lm.generate_until(requests, disable_tqdm=True)
    for (context, _), answer in zip(TEXTS, answers, strict=True):
        row = torch.cat((CONTEXT, torch.tensor(ids(context))))[None]
        new = llama.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=5, do_sample=False)[0]
        assert answer == tokenizer.decode(new[row.shape[1] :], skip_special_tokens=True).split("zz")[0]
    assert len(set(answers)) > 1
    stop = answers[0][2]
    (cut,) = lm.generate_until(
        instances("generate_until", [(TEXTS[0][0], {**settings, "until": [stop]})]), disable_tqdm=True
    )
    assert cut == answers[0].split(stop)[0]


def test_what_the_prefix_leaves_of_the_positions(llama, lm, prefix):
    assert lm.max_length == llama.config.max_position_embeddings - len(CONTEXT)
    assert PrefixLM(llama, prefix, tokenizer=char_tokenizer(), max_length=9, **SETTINGS).max_length == 9


def test_bos_is_the_prefixs_own(llama, prefix):
    tokenizer = char_tokenizer(adds_bos=True)
    lm = PrefixLM(llama, prefix, tokenizer=tokenizer, **SETTINGS)
    assert lm.tok_encode("ice") == list(ids("ice"))
    lm = PrefixLM(llama, prefix, tokenizer=tokenizer, add_bos_token=True, **SETTINGS)
    assert lm.tok_encode("ice") == [BOS, *ids("ice")]


def test_adapters_with_weights(llama):
    """LoRA weights are merged during a request and taken out after it."""
    tokenizer = char_tokenizer()
    settings = get_method("ttt").settings(epochs=2, lr=0.05)
    adapter = tune(llama, tokenizer, DEMONSTRATIONS, "ttt", settings).adapter
    assert adapter.lora is not None
    lm = PrefixLM(llama, adapter, tokenizer=tokenizer, **SETTINGS)
    before = [p.clone() for p in llama.parameters()]
    ((value, _),) = lm.loglikelihood(instances("loglikelihood", [(" ice", " cold")]), disable_tqdm=True)
    with adapter.weights(llama), adapter.prefix.attach(llama), torch.no_grad():
        row = torch.tensor(ids(" ice cold"))
        logits = llama(row[None, :-1]).logits[0, -5:].log_softmax(-1)
    assert close(value, float(logits.gather(1, row[-5:, None]).sum()))
    assert all(torch.equal(a, b) for a, b in zip(before, llama.parameters(), strict=True))


def write_task(folder, name, data, rest):
    (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data, rest=rest))


@pytest.fixture
def saved(llama, prefix, tmp_path):
    """A folder with a model, a prefix and tasks."""
    make_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    model = make_model("llama", torch.float32)
    KVPrefix.from_tokens(model, CONTEXT, SEGMENTS).save_pretrained(tmp_path / "prefix")
    data = write_jsonl(tmp_path / "test.jsonl", DEMONSTRATIONS)
    choice = 'output_type: multiple_choice\ndoc_to_choice: "{{options}}"\ndoc_to_target: "{{output}}"'
    write_task(tmp_path, "warmth", data, f"{choice}\nmetric_list: [{{metric: acc}}]")
    return tmp_path


def test_a_task_of_the_harness(saved, monkeypatch):
    """A YAML task over a local JSONL, with the network off: accuracy is that of the direct computation."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(saved / "cache"))
    manager = TaskManager(include_path=str(saved), include_defaults=False)
    results = simple_evaluate(
        model=NAME,
        model_args={"pretrained": f"{saved}/model", "prefix": f"{saved}/prefix", "dtype": "float32"},
        tasks=["warmth"],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        **SETTINGS,
    )
    model = make_model("llama", torch.float32)
    right = 0
    for demonstration, sample in zip(DEMONSTRATIONS, results["samples"]["warmth"], strict=True):
        scores = []
        for option, (value, _) in zip(demonstration.options, sample["filtered_resps"], strict=True):
            scores.append(direct(model, ids(f" {demonstration.input} {option}"), len(option) + 1)[0])
            assert abs(float(value) - scores[-1]) < 1e-4 * abs(scores[-1])
        right += demonstration.options[scores.index(max(scores))] == demonstration.output
    assert results["results"]["warmth"]["acc,none"] == right / len(DEMONSTRATIONS)


def test_the_command(saved, monkeypatch, capsys):
    """lm-eval's own command line, as `python -m ctkernels.tuning.lm_eval` starts it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(saved / "cache"))
    command = f"run --model ctkernels --model_args pretrained={saved}/model,prefix={saved}/prefix,dtype=float32"
    command += f" --tasks warmth --include_path {saved} --device cpu --batch_size 4 --output_path {saved}/results"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command.split()])
    # as in a process of its own, without reading the thousands of tasks that lm-eval brings
    monkeypatch.delitem(model_registry._objs, NAME)
    monkeypatch.delitem(sys.modules, "ctkernels.tuning.evaluation.lm_eval")
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    runpy.run_module("ctkernels.tuning.lm_eval", run_name="__main__")
    (path,) = (saved / "results").rglob("results_*.json")
    record = json.loads(path.read_text())
    assert 0 <= record["results"]["warmth"]["acc,none"] <= 1 and record["n-samples"]["warmth"]["effective"] == 5
    assert "|warmth|" in capsys.readouterr().out


def test_what_is_refused(llama, prefix, saved):
    tokenizer = char_tokenizer()
    with pytest.raises(TypeError, match="prefix must be a folder, an Adapter or a KVPrefix, got int"):
        PrefixLM(llama, 3, tokenizer=tokenizer, **SETTINGS)
    with pytest.raises(PrefixFileError):
        PrefixLM("a model that is not loaded", saved / "nothing", **SETTINGS)
    with pytest.raises(ValueError, match="puts demonstrations in words"):
        PrefixLM(llama, replace(Adapter(prefix), demonstrations=tuple(DEMONSTRATIONS)), tokenizer=tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match="prefix layer 0 has 2 KV heads"):
        PrefixLM(make_model("llama", num_key_value_heads=4), prefix, tokenizer=tokenizer, **SETTINGS)


def test_offsets_are_not_used_and_a_warning_says_so(llama, lm, prefix):
    offsets = Offsets("batch", "mean", {" ok": 5.0, " cold": 0.0})
    with pytest.warns(UserWarning, match=r"are not used by lm-eval; Adapter\.evaluate uses them"):
        other = PrefixLM(llama, Adapter(prefix, offsets=offsets), tokenizer=char_tokenizer(), **SETTINGS)
    pairs = [(TEXTS[0][0], answer) for answer in offsets.values]
    first, second = (x.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for x in (lm, other))
    assert first == second
