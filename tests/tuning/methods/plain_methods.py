"""CT-Prompt and test-time training in plain PyTorch and transformers, to hold the learners against.

Shares no code with `ctkernels`. Rows are right-padded, a dense mask says what every query sees, the output head runs on
every token. CT-KV and prefix tuning: see `ctkernels/testing/plain_ctkv.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass
class PlainRun:
    """Losses of every epoch (mean over its rows, before each step), and the trained tensors by name."""

    tensors: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)


def optimise(
    run: PlainRun,
    losses_of: Callable[[int, list[int]], Tensor],
    steps_of: Callable[[int], list[list[int]]],
    epochs: int,
    lr: float,
    clip_norm: float = 1.0,
) -> PlainRun:
    """AdamW with one step for each list of rows, a cosine to 0 over all steps, the norm clipped.

    losses_of: (epoch, rows) -> the loss of each row.  steps_of: epoch -> the rows of each step.
    """
    parameters = list(run.tensors.values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    total, done = sum(len(steps_of(epoch)) for epoch in range(epochs)), 0
    for epoch in range(epochs):
        seen = []
        for rows in steps_of(epoch):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done / total))
            losses = losses_of(epoch, rows)
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            seen += losses.tolist()
            done += 1
        run.losses.append(sum(seen) / len(seen))
    return run


def padded(sequences: Sequence[Sequence[int]], labelled: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens [B, S] and, where a position's next token is one of the `labelled` ones, that token, else -100."""
    size = max(map(len, sequences))
    tokens, labels = torch.zeros(len(sequences), size, dtype=torch.long), torch.full((len(sequences), size), -100)
    for b, sequence in enumerate(sequences):
        tokens[b, : len(sequence)] = torch.tensor(list(sequence))
        for at in labelled[b]:
            labels[b, at - 1] = sequence[at]
    return tokens, labels


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labels of each row, [B]."""
    loss = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return loss.sum(1) / (labels != -100).sum(1)


def ct_prompt(
    model: PreTrainedModel,
    context: Tensor,
    visible: Callable[[int], Tensor],
    sequences: Sequence[Sequence[int]],
    labelled: Sequence[Sequence[int]],
    steps_of: Callable[[int], list[list[int]]],
    epochs: int,
    lr: float,
) -> PlainRun:
    """Train the embeddings of `context`, int64 [C], in front of every row.

    visible: epoch -> bool [rows, C], which prompt tokens a row sees, from whichever position.
    """
    embedding = model.get_input_embeddings()
    prompt = embedding(context).detach().clone().requires_grad_()
    length = len(context)

    def losses(epoch: int, rows: list[int]) -> Tensor:
        tokens, labels = padded([sequences[r] for r in rows], [labelled[r] for r in rows])
        whole = length + tokens.shape[1]
        embedded = torch.cat((prompt.expand(len(rows), -1, -1), embedding(tokens)), dim=1)
        sees = torch.ones(len(rows), whole, whole, dtype=torch.bool).tril()
        sees[:, :, :length] &= visible(epoch)[rows][:, None]
        mask = torch.zeros(sees.shape, dtype=embedded.dtype).masked_fill(~sees, torch.finfo(embedded.dtype).min)
        positions = torch.arange(whole).expand(len(rows), whole)
        logits = model(inputs_embeds=embedded, attention_mask=mask[:, None], position_ids=positions).logits
        return mean_losses(logits[:, length:], labels)

    return optimise(PlainRun({"prompt": prompt}), losses, steps_of, epochs, lr)


class PlainLora(nn.Module):
    """y = layer(x) + scale * x A^T B^T."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * (x @ self.a.T) @ self.b.T


def with_lora(model: PreTrainedModel, start: dict[str, tuple[Tensor, Tensor]], scale: float) -> PreTrainedModel:
    """A copy of the model whose modules named in `start` (path -> A [r, in], B [out, r]) carry an update."""
    model = copy.deepcopy(model)
    for path, (a, b) in start.items():
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(path)
        assert isinstance(layer, (nn.Linear, Conv1D))
        setattr(model.get_submodule(parent), name, PlainLora(layer, a, b, scale))
    return model


def ttt(
    model: PreTrainedModel,
    sequences_of: Callable[[int], tuple[list[list[int]], list[list[int]]]],
    steps_of: Callable[[int], list[list[int]]],
    epochs: int,
    lr: float,
) -> PlainRun:
    """Train the A and B of a model from `with_lora`.

    sequences_of: epoch -> whole sequences, and of each the indices of the tokens that are labels.
    """
    tensors = {name: p for name, p in model.named_parameters() if name.endswith((".a", ".b"))}

    def losses(epoch: int, rows: list[int]) -> Tensor:
        sequences, labelled = sequences_of(epoch)
        tokens, labels = padded([sequences[r] for r in rows], [labelled[r] for r in rows])
        return mean_losses(model(input_ids=tokens).logits, labels)  # padding behind a row is seen by no label

    return optimise(PlainRun(tensors), losses, steps_of, epochs, lr)
