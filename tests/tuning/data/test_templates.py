"""An instruction and a template: the tokens of a context and its rows, written out, and what sees what."""

import pytest
import torch

from ctkernels.testing.models import make_model
from ctkernels.testing.tasks import DEMONSTRATIONS, char_tokenizer
from ctkernels.tuning.data.demonstrations import Demonstration
from ctkernels.tuning.data.formats import (
    DELIMITER,
    INPUT,
    OUTPUT,
    SPECIAL,
    PairEncoder,
    TextFormat,
    encode_context,
    encode_prompt,
    encode_rows,
)
from ctkernels.tuning.methods.tune import tune
from tests.tuning.runs import NAMES, settings

TOKENIZER = char_tokenizer(adds_bos=True)
PAIRS = [Demonstration("ice", "cold", ("warm", "cold")), Demonstration("sun", "warm", ("warm", "cold"))]
TEXT = TextFormat(" ", instruction="say it", template="in {input} out {output}")


def text(tokens) -> str:
    return TOKENIZER.decode(torch.as_tensor(tokens).tolist())


def test_the_tokens_of_a_context():
    context = encode_context(TOKENIZER, PAIRS, TEXT)
    assert context.input_ids[0] == TOKENIZER.bos_token_id
    assert text(context.input_ids[1:]) == "say it in ice out cold in sun out warm"
    pieces = [text(context.input_ids[a:b]) for a, b in context.segments.unfold(0, 2, 1).tolist()]
    assert pieces == [" in ice out cold", " in sun out warm"]  # the instruction belongs to none
    kinds = {kind: text(context.input_ids[1:][context.kinds[1:] == kind]) for kind in range(4)}
    assert kinds == {SPECIAL: "say it", DELIMITER: "  ", INPUT: "in ice out in sun out ", OUTPUT: "coldwarm"}
    rows = encode_rows(TOKENIZER, PAIRS, TEXT)
    assert [text(row.tokens) for row in rows] == [" in ice out col", " in sun out war"]
    assert text(encode_prompt(TOKENIZER, "ice", TEXT)) == " in ice out "


def test_an_instruction_alone():
    only = TextFormat(" ", instruction="say it")
    assert text(encode_context(TOKENIZER, PAIRS, only).input_ids[1:]) == "say it ice cold sun warm"
    assert text(encode_context(TOKENIZER, (), only).input_ids[1:]) == "say it"
    assert encode_context(TOKENIZER, (), only).segments.tolist() == [7]


def test_a_long_input_loses_its_end_and_no_text_of_the_template():
    short = TextFormat(" ", max_pair_tokens=16, template="in {input} out {output}")
    encoder = PairEncoder(TOKENIZER, short)
    assert text(encoder.prompt(Demonstration("abcdefghij", "ok"), 2)) == "in abcdef out "
    assert text(encoder.prompt(Demonstration("abcdef", "ok"), 2)) == "in abcdef out "
    with pytest.warns(UserWarning, match="1 inputs lost their end to keep a pair within 16 tokens: 'abcdefghij'"):
        encoder.report_cuts()


@pytest.mark.parametrize(
    "template", ["{output}", "in {input}", "{input}{output}", "{input} {input} {output}", "{input} {output}."]
)
def test_templates_that_cannot_be_used(template):
    with pytest.raises(ValueError, match=r"template must .*, got "):
        TextFormat(template=template)


def test_what_is_recorded_is_what_earlier_versions_wrote_where_nothing_is_new():
    assert TextFormat().recorded == {"delimiter": " ", "max_pair_tokens": 256, "bos": None}
    assert TextFormat(**TEXT.recorded) == TEXT


@pytest.mark.parametrize("name", NAMES)
def test_every_method_reads_an_instruction_and_a_template(name):
    """Rows behind the prefix are scored as the whole text would be, up to what was trained."""
    model = make_model("llama", torch.float64)
    own = settings(name, **({"epochs": 0} if hasattr(settings(name), "epochs") else {}))
    short = TextFormat(" ", instruction="hi", template="{input} = {output}")
    demonstrations = DEMONSTRATIONS[:3]
    result = tune(model, TOKENIZER, demonstrations, name, own, short)
    item = Demonstration("ink", "ok", ("warm", "ok"))
    scores = result.adapter.evaluate(model, TOKENIZER, [item])
    if name not in ("icl", "ct-kv", "ct-prompt", "cpt", "zero-shot"):
        assert scores.items == 1
        return
    context = encode_context(TOKENIZER, () if name == "zero-shot" else demonstrations, short).input_ids
    row = torch.tensor([*encode_prompt(TOKENIZER, "ink", short), *PairEncoder(TOKENIZER).encode("ok")])
    with torch.no_grad():
        logits = model(torch.cat((context, row))[None]).logits[0].log_softmax(-1)
    answer = PairEncoder(TOKENIZER).encode("ok")
    at = len(context) + len(row) - len(answer) - 1
    expected = -sum(logits[at + i, token] for i, token in enumerate(answer)) / len(answer)
    assert scores.gold_loss == pytest.approx(expected.item(), abs=1e-6)


def test_no_row_has_the_instruction_hidden_from_it():
    model = make_model("llama", torch.float64)
    own = settings("ct-kv", epochs=1, drop_p=0.0)
    result = tune(model, TOKENIZER, DEMONSTRATIONS[:3], "ct-kv", own, TEXT)
    assert result.prefix.segments[0] == 1 + len("say it")
    start = tune(model, TOKENIZER, DEMONSTRATIONS[:3], "ct-kv", settings("ct-kv", epochs=0), TEXT).prefix
    moved = (result.prefix.keys[1] - start.keys[1]).abs().amax(dim=(0, 2))
    assert (moved[: result.prefix.segments[0]] > 0).all()  # every row reads and trains it


def test_the_instruction_of_a_new_task_follows_the_prefix_of_another():
    model = make_model("llama", torch.float64)
    other = tune(model, TOKENIZER, DEMONSTRATIONS[:2], "ct-kv", settings("ct-kv", epochs=1)).adapter
    moved = tune(model, TOKENIZER, PAIRS, "ct-kv", settings("ct-kv", epochs=0), TEXT, start_from=other).prefix
    own = len(encode_context(TOKENIZER, PAIRS, TEXT).input_ids) - 1  # without BOS
    assert moved.length == other.prefix.length + own
    assert moved.segments[0] == other.prefix.length + len("say it")
