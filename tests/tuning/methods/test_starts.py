"""What training starts from."""

import pytest
import torch
from transformers import DynamicCache

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import BOS, DEMONSTRATIONS, SPACE, char_tokenizer, ids
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.data.demonstrations import DataError, Demonstration
from ctkernels.tuning.data.formats import INPUT, OUTPUT, SPECIAL, encode_context
from ctkernels.tuning.hf.encode import encode_tokens
from ctkernels.tuning.hf.models import find_decoder
from ctkernels.tuning.hf.rotary import rotated, unrotated
from ctkernels.tuning.methods import get_method
from ctkernels.tuning.methods.tune import tune

TOKENIZER = char_tokenizer(adds_bos=True)
CONTEXT = encode_context(TOKENIZER, DEMONSTRATIONS)
P = len(CONTEXT.input_ids)
TINY = 1e-12  # a learning rate: what is left of the start after one step


@pytest.fixture(params=["llama", "gpt2", "bloom", "gpt_neox", "gemma3"], scope="module")
def model(request):
    return make_model(request.param)


def start(model, demonstrations=DEMONSTRATIONS, start_from=None, **options) -> KVPrefix:
    settings = get_method("ct-kv").settings(epochs=1, lr=TINY, **options)
    return tune(model, TOKENIZER, demonstrations, "ct-kv", settings, start_from=start_from).prefix


def assert_layers(prefix: KVPrefix, keys, values, tolerance=1e-5) -> None:
    for actual, expected in zip([*prefix.keys, *prefix.values], [*keys, *values], strict=True):
        torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


def stock(model, tokens) -> tuple[list, list]:
    return encode_tokens(model, torch.tensor(tokens))


def test_kinds_say_what_each_token_is():
    first = len(DEMONSTRATIONS[0].input)
    assert CONTEXT.kinds[0] == SPECIAL and (CONTEXT.kinds[1 : first + 1] == INPUT).all()
    answers = "".join(d.output for d in DEMONSTRATIONS)
    assert tuple(CONTEXT.input_ids[CONTEXT.kinds == OUTPUT].tolist()) == ids(answers)
    assert len(CONTEXT.kinds) == P


YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("gpt_neox", {}), ("gemma3", {}), ("qwen3", {}), ("llama", {"rope_parameters": YARN})],
    ids=["llama", "gpt_neox", "gemma3", "qwen3", "yarn"],
)
def test_rotation_is_taken_off_and_put_on(name, changes):
    """Would catch: a wrong half, a wrong sign, rotating dimensions that a model leaves alone, one rotation for all
    layers, a scale (of YaRN) that is put on twice."""
    model = make_model(name, **changes)
    decoder = find_decoder(model)
    # a token at positions 0 and 5 has, in the first layer, one key and two rotations
    one, _ = encode_tokens(model, torch.tensor([7, 9, 11]), behind=None)
    empty = KVPrefix.from_tokens(model, torch.empty(0, dtype=torch.long), torch.tensor([0]))
    other, _ = encode_tokens(model, torch.tensor([7, 9, 11]), behind=empty, position=5)
    here, there = torch.arange(3), torch.arange(5, 8)
    assert (one[0] - other[0]).abs().max() > 1e-2
    for layer in range(len(one)):  # relative positions are all that counts, so it holds in every layer
        moved = rotated(decoder, layer, unrotated(decoder, layer, one[layer], here), there)
        torch.testing.assert_close(moved, other[layer], rtol=0, atol=1e-5)
        back = rotated(decoder, layer, unrotated(decoder, layer, one[layer], here), here)
        torch.testing.assert_close(back, one[layer], rtol=0, atol=1e-5)


def test_separate_segments_know_nothing_of_their_neighbours(model):
    prefix = start(model, start="separate")
    assert torch.equal(prefix.segments, CONTEXT.segments) and prefix.first_position == P
    other = [DEMONSTRATIONS[0], Demonstration("fire", "warm"), *DEMONSTRATIONS[2:]]
    assert encode_context(TOKENIZER, other).segments[2] == CONTEXT.segments[2]  # of the same length
    changed = start(model, other, start="separate")
    within = start(model, other, start="context")
    context = start(model, start="context")
    a, b = CONTEXT.segments[1:3].tolist()
    for kind in ("keys", "values"):
        for layer in range(3):
            x, y = getattr(prefix, kind)[layer], getattr(changed, kind)[layer]
            difference = (x - y).abs().amax(dim=(0, 2))  # of each token; the step taken since is smaller than 1e-9
            assert difference[:a].max() < 1e-9 and difference[b:].max() < 1e-9 and difference[a:b].max() > 1e-2
    assert (within.values[-1] - context.values[-1])[:, b:].abs().max() > 1e-4
    # the first demonstration, right behind BOS, is what it is in the context
    assert_layers(prefix_part(prefix, 0, a), *prefix_part_layers(context, 0, a))


def prefix_part_layers(prefix, begin, end):
    return [k.detach()[:, begin:end] for k in prefix.keys], [v.detach()[:, begin:end] for v in prefix.values]


def prefix_part(prefix, begin, end) -> KVPrefix:
    return KVPrefix(*prefix_part_layers(prefix, begin, end), torch.tensor([0]), end - begin, prefix.metadata)


def test_separate_segments_lie_at_their_positions(model):
    """Its tokens behind BOS, with the positions they have in the context; BLOOM counts distances in what is read."""
    a, b = CONTEXT.segments[2:4].tolist()
    body = CONTEXT.input_ids[a:b]
    part = prefix_part(start(model, start="separate"), a, b)
    decoder = find_decoder(model)
    positions = torch.cat((torch.tensor([0]), torch.arange(a, b)))[None]
    numbered = {} if decoder.family.causal == "BloomForCausalLM" else {"position_ids": positions}
    tokens = torch.cat((torch.tensor([BOS]), body))[None]
    with torch.no_grad():
        cache = DynamicCache()  # without a config, so that layers with a window keep all keys
        model(tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache, **numbered)
    assert_layers(part, [x.keys[0][:, 1:] for x in cache.layers], [x.values[0][:, 1:] for x in cache.layers])


def test_permuted_start_is_the_mean_over_orders(model):
    """By hand for two demonstrations: the two orders, each token's key moved to where it belongs."""
    two = DEMONSTRATIONS[:2]
    x0, y0, x1, y1 = (ids(t) for d in two for t in (d.input, d.output))
    first, second = [*x0, SPACE, *y0], [SPACE, *x1, SPACE, *y1]
    settings = {"start": "permuted", "permutations": 6}
    prefix = start(model, two, **settings)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(2, generator=generator).tolist() for _ in range(6)]
    assert [0, 1] in drawn and [1, 0] in drawn
    decoder = find_decoder(model)
    n, m = len(first), len(second)
    own = torch.arange(1, 1 + n + m)
    keys, values = [0.0] * 3, [0.0] * 3
    for order in drawn:
        if order == [0, 1]:
            tokens, where = [BOS, *first, *second], list(range(1, 1 + n + m))
        else:
            tokens = [BOS, *second, SPACE, *first]
            where = [*range(2 + m, 2 + m + n), *range(1, 1 + m)]
        k, v = stock(model, tokens)
        for layer in range(3):
            turned = unrotated(decoder, layer, k[layer], torch.arange(len(tokens)))
            keys[layer] = keys[layer] + turned[:, where] / 6
            values[layer] = values[layer] + v[layer][:, where] / 6
    bos_k, bos_v = stock(model, [BOS])
    keys = [torch.cat((b, rotated(decoder, i, k, own)), 1) for i, (b, k) in enumerate(zip(bos_k, keys, strict=True))]
    values = [torch.cat((b, v), 1) for b, v in zip(bos_v, values, strict=True)]
    assert_layers(prefix, keys, values)
    assert prefix.segments.tolist() == [1, 1 + n, 1 + n + m] and prefix.first_position == 1 + n + m


def test_pooled_start(model):
    prefix = start(model, start="pooled", pooled_tokens=4)
    sizes = CONTEXT.segments.diff()
    assert prefix.segments.tolist() == [1, *(1 + ((sizes + 3) // 4).cumsum(0)).tolist()]
    whole = start(model, start="context")
    begin, end = CONTEXT.segments[1].item(), CONTEXT.segments[1].item() + 4
    at = prefix.segments[1].item()
    value = whole.values[2].detach()[:, begin:end].mean(1)
    torch.testing.assert_close(prefix.values[2].detach()[:, at], value, rtol=0, atol=1e-5)
    decoder = find_decoder(model)
    key = unrotated(decoder, 2, whole.keys[2].detach()[:, begin:end], torch.arange(begin, end)).mean(1, keepdim=True)
    key = rotated(decoder, 2, key, torch.tensor([end - 1]))[:, 0]
    torch.testing.assert_close(prefix.keys[2].detach()[:, at], key, rtol=0, atol=1e-5)
    # rows stay where they were, unless the model counts keys
    bloom = decoder.family.causal == "BloomForCausalLM"
    assert prefix.first_position == (prefix.length if bloom else P)
    # windows that hold nothing but one token change nothing
    assert_layers(start(model, start="pooled", pooled_tokens=1), *prefix_part_layers(whole, 0, P))


def test_labels_start_keeps_the_outputs(model):
    prefix, whole = start(model, start="labels"), start(model, start="context")
    kept = torch.cat((torch.tensor([0]), (CONTEXT.kinds == OUTPUT).nonzero()[:, 0]))
    assert_layers(prefix, [k.detach()[:, kept] for k in whole.keys], [v.detach()[:, kept] for v in whole.values])
    assert prefix.segments.diff().tolist() == [len(d.output) for d in DEMONSTRATIONS]


def test_front_tokens_come_behind_bos_and_before_the_demonstrations(model):
    prefix = start(model, front_tokens=3)
    assert prefix.segments.tolist() == (CONTEXT.segments + 3).tolist() and prefix.first_position == P + 3
    generator = torch.Generator().manual_seed(0)
    ordinary = [i for i in range(len(TOKENIZER)) if i not in TOKENIZER.all_special_ids]
    front = [ordinary[i] for i in torch.randperm(len(ordinary), generator=generator)[:3].tolist()]
    assert_layers(prefix, *stock(model, [BOS, *front, *CONTEXT.input_ids[1:].tolist()]))
    assert prefix.context == (BOS, *front, *CONTEXT.input_ids[1:].tolist())
    assert not torch.equal(prefix.values[0], start(model, front_tokens=3, seed=1).values[0])


def test_transfer_puts_another_tasks_prefix_in_front(model):
    other = tune(model, TOKENIZER, DEMONSTRATIONS[3:], "ct-kv", get_method("ct-kv").settings(epochs=2, lr=0.1))
    size = other.prefix.length
    prefix = start(model, DEMONSTRATIONS[:3], start_from=other.adapter)
    own = encode_context(TOKENIZER, DEMONSTRATIONS[:3])
    assert prefix.segments.tolist() == (own.segments + size - 1).tolist()  # one BOS, the other's
    assert prefix.first_position == size + len(own.input_ids) - 1
    assert_layers(prefix_part(prefix, 0, size), *prefix_part_layers(other.prefix, 0, size))
    assert prefix.context == (*other.prefix.context, *own.input_ids[1:].tolist())
    behind = encode_tokens(model, own.input_ids[1:], behind=other.prefix)
    assert_layers(prefix_part(prefix, size, prefix.length), *behind)


def test_other_starts_behind_a_transferred_prefix(model):
    other = tune(model, TOKENIZER, DEMONSTRATIONS[3:], "icl")
    for kind in ("separate", "permuted", "pooled", "labels"):
        prefix = start(model, DEMONSTRATIONS[:3], start_from=other.adapter, start=kind, front_tokens=2)
        assert prefix.segments[0] == other.prefix.length + 2


@pytest.mark.parametrize("kind", ["vocabulary", "first-ids", "normal"])
def test_prefix_tuning_starts(model, kind):
    settings = get_method("prefix-tuning").settings(epochs=1, lr=TINY, prompt_tokens=6, start=kind)
    prefix = tune(model, TOKENIZER, DEMONSTRATIONS, "prefix-tuning", settings).prefix
    assert (prefix.length, prefix.first_position, prefix.num_demonstrations) == (7, 7, 0)
    if kind == "first-ids":
        assert_layers(prefix, *stock(model, [BOS, *range(6)]))
    if kind == "normal":
        keys, _ = stock(model, [BOS, *ordinary_ids(6)])
        assert prefix.keys[1].std().item() == pytest.approx(keys[1].std().item(), rel=0.3)
        assert (prefix.keys[1] - keys[1]).abs().max() > 0.1
    if kind == "vocabulary":
        assert_layers(prefix, *stock(model, [BOS, *ordinary_ids(6)]))


def ordinary_ids(count: int) -> list[int]:
    """Token ids drawn with seed 0."""
    ordinary = [i for i in range(len(TOKENIZER)) if i not in TOKENIZER.all_special_ids]
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(0))
    return [ordinary[i] for i in order[:count].tolist()]


def test_more_tokens_than_the_vocabulary_has_are_refused():
    with pytest.raises(DataError, match="50 random tokens were asked of a vocabulary of 39"):
        tune(make_model("llama"), TOKENIZER, DEMONSTRATIONS[:2], "prefix-tuning",
             get_method("prefix-tuning").settings(prompt_tokens=50))  # fmt: skip


def test_rotation_that_depends_on_the_length_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_model("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match=r"start='pooled' moves keys .* LlamaForCausalLM rotates keys differently"):
        start(model, start="pooled")
    assert start(model, start="labels").length > 0
