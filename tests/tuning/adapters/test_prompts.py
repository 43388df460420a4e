"""Methods with a soft prompt: what is hidden from whom, bounds, demonstrations in words, networks, transfer."""

import pytest
import torch
from peft import CPTConfig
from peft.tuners.cpt.model import CPTEmbedding

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, SPACE, char_tokenizer, ids
from ctkernels.tuning.adapters.prompt import SoftPrompt
from ctkernels.tuning.data.batches import make_batch
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import DELIMITER, INPUT, OUTPUT, encode_context, encode_rows
from ctkernels.tuning.data.retrieval import InWordsEncoder
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune
from ctkernels.tuning.train.learners import PromptLearner

TOKENIZER = char_tokenizer(adds_bos=True)
CONTEXT = encode_context(TOKENIZER, DEMONSTRATIONS)
ROWS = encode_rows(TOKENIZER, DEMONSTRATIONS)


@pytest.fixture(params=["llama", "gpt2", "bloom", "opt", "gemma2"], scope="module")
def model(request):
    return make_model(request.param)


def losses(model, embeddings: torch.Tensor, rows=tuple(range(5)), **options) -> torch.Tensor:
    settings = get_method("ct-prompt").settings(**{"drop_p": 0.0, **options})
    prompt = SoftPrompt(embeddings, CONTEXT.segments)
    learner = PromptLearner(model, prompt, ROWS, settings)
    with learner.attached(None):
        return learner.losses(make_batch(ROWS, rows, settings.layout, learner.lead), 7)


def test_a_hidden_demonstration_reaches_no_query(model):
    """Would catch a demonstration that is hidden from the row's tokens, but read by later tokens of the prompt."""
    embeddings = model.get_input_embeddings()(CONTEXT.input_ids).detach()
    for row in (0, 2):
        changed = embeddings.clone()
        begin, end = CONTEXT.segments[row : row + 2].tolist()
        changed[begin:end] += torch.randn(end - begin, embeddings.shape[1], dtype=torch.float64)
        same, other = (losses(model, e, (row, 4)) for e in (embeddings, changed))
        assert same[0] == other[0] and same[1] != other[1]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows_in_a_batch_do_not_meet(model, layout):
    embeddings = model.get_input_embeddings()(CONTEXT.input_ids).detach()
    together = losses(model, embeddings, layout=layout)
    alone = torch.cat([losses(model, embeddings, (i,)) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["prompt-tuning", "ipt", "ct-prompt", "cpt"])
def test_the_prefix_that_is_left_predicts_as_the_prompt_did(model, method):
    """Would catch: rows at other positions behind the prefix than behind the prompt, a missing delimiter."""
    settings = get_method(method).settings(epochs=2, lr=1e-2)
    result = tune(model, TOKENIZER, DEMONSTRATIONS, method, settings)
    adapter = result.adapter
    item = Demonstration("hot sand", "warm")
    evaluated = adapter.evaluate(model, TOKENIZER, [item], by="generation", max_new_tokens=1)
    encoder = adapter.encoder(TOKENIZER)
    row = encode_rows(TOKENIZER, [item], encoder=encoder)[0]
    prompt = adapter.prompt.embeddings
    embedded = torch.cat((prompt, model.get_input_embeddings()(torch.tensor(row.tokens))))
    with torch.no_grad():
        logits = model(inputs_embeds=embedded[None]).logits[0, len(prompt) + row.first_label :]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row.answers[0]))
    assert evaluated.gold_loss == pytest.approx(expected.item(), abs=1e-5)
    assert result.history[0].loss != result.history[1].loss


def test_a_network_writes_the_prompt_while_it_is_trained():
    model = make_model("llama")
    plain, network = (
        tune(model, TOKENIZER, DEMONSTRATIONS, "prompt-tuning",
             get_method("prompt-tuning").settings(epochs=8, lr=1e-2, mlp_width=width, prompt_tokens=5))
        for width in (None, 8)
    )  # fmt: skip
    assert network.history[-1].loss < network.history[0].loss
    start = tune(model, TOKENIZER, DEMONSTRATIONS, "prompt-tuning",
                 get_method("prompt-tuning").settings(epochs=1, lr=1e-12, prompt_tokens=5))  # fmt: skip
    moved = (network.adapter.prompt.embeddings - start.adapter.prompt.embeddings).detach()
    assert (moved.abs().amax(1) > 1e-3).all()
    assert not torch.equal(network.adapter.prompt.embeddings, plain.adapter.prompt.embeddings)


@pytest.mark.parametrize("kind", ["vocabulary", "first-ids", "uniform"])
def test_starts(kind):
    model = make_model("llama")
    settings = get_method("prompt-tuning").settings(epochs=1, lr=1e-12, start=kind, prompt_tokens=6)
    prompt = tune(model, TOKENIZER, DEMONSTRATIONS, "prompt-tuning", settings).adapter.prompt
    table = model.get_input_embeddings().weight
    distances = torch.cdist(prompt.embeddings.detach(), table)  # [7, V]
    nearest, which = distances.min(1)
    assert len(nearest) == 7  # BOS comes along
    if kind == "uniform":
        assert (nearest > 1e-2).all() and prompt.embeddings.std().item() == pytest.approx(table.std().item(), rel=0.5)
    else:
        assert (nearest < 1e-6).all()  # cdist takes differences of squares
        assert kind == "vocabulary" or which.tolist()[1:] == list(range(6))
        assert kind == "first-ids" or not set(which.tolist()[1:]) & set(TOKENIZER.all_special_ids)


def test_cpt_stays_in_its_balls_and_moves_no_output():
    model = make_model("llama")
    settings = get_method("cpt").settings(epochs=5, lr=0.1, radius=0.8, format_radius=0.4)
    prompt = tune(model, TOKENIZER, DEMONSTRATIONS, "cpt", settings).adapter.prompt
    start = model.get_input_embeddings()(CONTEXT.input_ids)
    moved = (prompt.embeddings - start).detach().norm(dim=1)
    scale = (32 / 2048) ** 0.5
    assert (moved[CONTEXT.kinds == OUTPUT] == 0).all() and moved[0] == 0  # BOS
    for kind, radius in ((INPUT, 0.8), (DELIMITER, 0.4)):
        part = moved[CONTEXT.kinds == kind]
        assert (part <= radius * scale * (1 + 1e-9)).all() and (part > 0).all()
        assert (part > radius * scale * (1 - 1e-6)).any()  # the bound binds


def test_cpt_projects_and_freezes_as_peft_does():
    """The same gradients lead both to the same embeddings, step by step."""
    model = make_model("llama", torch.float32)
    kinds = CONTEXT.kinds
    types = torch.full_like(kinds, 4)  # peft: 0 modulo 4 is a label, 1 and 3 templates, 2 an input
    types[kinds == INPUT], types[kinds == DELIMITER], types[0] = 2, 1, 0
    width, length = 32, len(kinds)
    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=CONTEXT.input_ids.tolist(),
        cpt_mask=[1] * length,
        cpt_tokens_type_mask=types.tolist(),
        opt_projection_epsilon=0.8,
        opt_projection_format_epsilon=0.4,
        num_virtual_tokens=length,
    )
    config.token_dim = width
    theirs = CPTEmbedding(config, model.get_input_embeddings())
    settings = get_method("cpt").settings(radius=0.8, format_radius=0.4, lr=0.1)
    prompt = SoftPrompt.from_tokens(model, CONTEXT.input_ids, CONTEXT.segments)
    radii = torch.zeros(length)
    radii[kinds == INPUT], radii[kinds == DELIMITER] = 0.8 * (width / 2048) ** 0.5, 0.4 * (width / 2048) ** 0.5
    ours = PromptLearner(model, prompt, ROWS, settings, radii)
    optimizers = [torch.optim.AdamW([p], lr=0.1, weight_decay=0.0) for p in (
        theirs.delta_embedding.weight, prompt.embeddings)]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        gradient = torch.randn(length, width, generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (theirs(torch.arange(length)) * gradient).sum().backward()
        (prompt.embeddings * gradient).sum().backward()
        ours.before_step()
        for optimizer in optimizers:
            optimizer.step()
        ours.after_step()
        with torch.no_grad():
            torch.testing.assert_close(theirs(torch.arange(length)), prompt.embeddings, rtol=0, atol=1e-6)


def test_demonstrations_in_words():
    pool = [Demonstration("red wine", "ok"), Demonstration("zzz", "cold"), Demonstration("red red brick", "warm")]
    encoder = InWordsEncoder(TOKENIZER, None, pool, 2, "similar", 0)
    chosen = encoder.choose(Demonstration("brick", "warm"))
    assert chosen == [pool[0], pool[2]]  # the most similar one last, "zzz" not at all
    tokens = encoder.prompt(Demonstration("brick", "warm"), 4)
    assert tokens == ids("red wine ok red red brick warm brick ")
    assert pool[2] not in encoder.choose(pool[2])
    row = encode_rows(TOKENIZER, [Demonstration("brick", "warm")], encoder=encoder)[0]
    assert row.tokens == (SPACE, *tokens, *ids("war")) and row.answers == (ids("warm"),)


def test_fixed_demonstrations_are_the_same_for_all_and_never_the_row_itself():
    encoder = InWordsEncoder(TOKENIZER, None, DEMONSTRATIONS, 3, "fixed", 4)
    shown = encoder.choose(Demonstration("x", "ok"))
    assert shown == encoder.choose(Demonstration("completely different", "cold")) and len(shown) == 3
    assert shown[0] not in encoder.choose(shown[0]) and len(encoder.choose(shown[0])) == 3
    others = [InWordsEncoder(TOKENIZER, None, DEMONSTRATIONS, 3, "fixed", seed) for seed in range(4)]
    assert any(o.choose(Demonstration("x", "ok")) != shown for o in others)


def test_ranking_is_bm25():
    """By hand: pool "ab", "abb", "c"; query "b" is in two of three, idf = ln(1 + 1.5 / 2.5); mean length 2."""
    pool = [Demonstration(x, "ok") for x in ("ab", "abb", "c")]
    encoder = InWordsEncoder(TOKENIZER, None, pool, 2, "similar", 0)
    idf = torch.log(torch.tensor(1.6)).item()
    for index, (count, length) in enumerate(((1, 2), (2, 3), (0, 1))):
        expected = idf * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * length / 2))
        assert encoder._score(set(ids("b")), index) == pytest.approx(expected, rel=1e-6)


def test_transfer_of_prompts():
    model = make_model("llama")
    first = tune(model, TOKENIZER, DEMONSTRATIONS[3:], "prompt-tuning",
                 get_method("prompt-tuning").settings(epochs=3, lr=0.1, prompt_tokens=5)).adapter  # fmt: skip
    still = {"epochs": 1, "lr": 1e-12}
    for method in ("prompt-tuning", "ipt"):
        again = tune(model, TOKENIZER, DEMONSTRATIONS[:3], method, get_method(method).settings(**still),
                     start_from=first).adapter  # fmt: skip
        torch.testing.assert_close(again.prompt.embeddings, first.prompt.embeddings, rtol=0, atol=1e-9)
    behind = tune(model, TOKENIZER, DEMONSTRATIONS[:3], "ct-prompt", get_method("ct-prompt").settings(**still),
                  start_from=first).adapter.prompt  # fmt: skip
    own = encode_context(TOKENIZER, DEMONSTRATIONS[:3])
    torch.testing.assert_close(behind.embeddings[:6], first.prompt.embeddings, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        behind.embeddings[6:], model.get_input_embeddings()(own.input_ids[1:]), rtol=0, atol=1e-9
    )
    assert behind.segments.tolist() == (own.segments + 5).tolist()
