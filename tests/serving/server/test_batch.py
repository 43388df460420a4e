"""A batch whose rows join and leave: every greedy answer is that of `generate` with the row's prefix alone."""

import random

import pytest
import torch
import transformers

from ctkernels.serving.server import servable
from ctkernels.serving.server.batch import Batch
from ctkernels.serving.server.servable import require_servable
from ctkernels.serving.server.slots import Slots
from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning import KVPrefix
from ctkernels.tuning.hf.tiny import make_tiny, shrink
from tests.serving.server.serving import continued

# grouped heads, windows in all layers and in some, ALiBi
CLASSES = ("llama", "mistral", "gemma3", "bloom")
KINDS = ["conv", "full_attention"] * 16


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_rows_that_join_and_leave_at_random(name):
    """Six prefixes, one of them empty, in a batch of four rows, which is too small to keep all prefixes."""
    model, drawn = make_model(name), random.Random(name)
    contexts = [tokens(n, seed=n) for n in (11, 19, 4, 7, 1)] + [torch.zeros(0, dtype=torch.int64)]
    prefixes = [KVPrefix.from_tokens(model, c, torch.tensor([0, len(c)])) for c in contexts]
    plans = [(tokens(drawn.randint(1, 9), seed=n), drawn.choice(prefixes), drawn.randint(1, 7)) for n in range(8)]
    expected = []
    for prompt, prefix, count in plans:
        with prefix.attach(model):
            expected.append(continued(model, prompt.tolist(), count))

    batch, members, answers, waiting = Batch(model, size=4), [], [[] for _ in plans], list(range(len(plans)))
    while waiting or members:
        new = [waiting.pop(0) for _ in range(min(len(waiting), drawn.randint(0, 4 - len(members))))]
        if new:
            logits = batch.join([plans[n][0].tolist() for n in new], [plans[n][1] for n in new])
            members += new
            for n, row in zip(new, logits, strict=True):
                answers[n].append(int(row.argmax()))
        for row in reversed(range(len(members))):
            if len(answers[members[row]]) == plans[members[row]][2]:
                batch.leave(row)
                last = members.pop()
                if row < len(members):
                    members[row] = last
        if members:
            for n, row in zip(members, batch.step([answers[n][-1] for n in members]), strict=True):
                answers[n].append(int(row.argmax()))
    batch.close()
    assert [answer[: plan[2]] for answer, plan in zip(answers, plans, strict=True)] == expected
    assert continued(model, plans[0][0].tolist(), 3)  # the model is as it was, with nothing attached


def test_slots():
    """They grow with the longest row and are given back with the last one."""
    slots = Slots(3)
    slots.join([2, 70])
    keys = torch.arange(2 * 70.0).reshape(2, 1, 70, 1)
    assert slots.update(keys, -keys, 0)[0] is keys
    slots.lengths += [2, 70]
    assert slots.layers[0].keys.shape == (3, 1, 128, 1)
    slots.leave(0)
    assert slots.lengths == [70] and torch.equal(slots.layers[0].keys[0, 0, :70, 0], keys[1, 0, :, 0])
    slots.step()
    found, values = slots.update(torch.full((1, 1, 1, 1), 7.0), torch.full((1, 1, 1, 1), 8.0), 0)
    assert found.shape == (1, 1, 71, 1) and found[0, 0, 70, 0] == 7 and values[0, 0, 70, 0] == 8
    slots.leave(0)
    assert not slots.layers and not slots.tokens


def test_what_cannot_be_served_is_refused():
    """Classes whose layers keep a state; and Whisper's decoder, which gives all rows of a batch the same position."""
    hybrid = make_tiny(transformers.Lfm2ForCausalLM, shrink(transformers.Lfm2Config(layer_types=KINDS)))
    with pytest.raises(TypeError, match=r"Lfm2ForCausalLM cannot be served: its layers keep a state \(Lfm2ShortConv\)"):
        require_servable(hybrid)
    whisper = make_tiny(transformers.WhisperForCausalLM, shrink(transformers.WhisperConfig()))
    with pytest.raises(TypeError, match="WhisperForCausalLM cannot be served: in a batch its results differ by"):
        require_servable(whisper)
    require_servable(make_model("gemma3"))


def test_the_proof_finds_a_mistake(monkeypatch):
    """A batch in which a row that leaves takes another one's keys with it."""
    monkeypatch.setattr(servable.Batch, "leave", lambda batch, row: (batch._slots.leave(row), batch._read.pop(row)))
    with pytest.raises(TypeError, match="LlamaForCausalLM cannot be served: in a batch its results differ"):
        require_servable(make_model("llama"))
