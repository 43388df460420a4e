"""Running a batch of rows through a frozen model with a prefix attached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ctkernels.tuning.data.batches import Batch, answer_losses
from ctkernels.tuning.hf.attach import Attachment
from ctkernels.tuning.hf.encode import differentiable_mode
from ctkernels.tuning.hf.parallel import reshard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Forward:
    """A batch of rows, and how the model runs on them.

    attachment: of what is trained, or of an empty prefix; its mask is that of the batch.
    prompt: embeddings `[batch.lead, E]` of a soft prompt at the start of each row, or None.
    passes: how often the model runs, at least: processes that share its weights all run it equally often.
    """

    model: PreTrainedModel
    attachment: Attachment
    batch: Batch
    prompt: Tensor | None = None
    passes: int = 1


def row_losses(model: PreTrainedModel, attachment: Attachment, batch: Batch, prompt: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats of each answer of a batch, `[number of answers]`.

    prompt: embeddings `[batch.lead, E]` of a soft prompt at the start of each row.
    """
    return answer_losses(kept_logits(model, attachment, batch, prompt), batch)


def kept_logits(model: PreTrainedModel, attachment: Attachment, batch: Batch, prompt: Tensor | None = None) -> Tensor:
    """Logits `[1 or B, U, V]` at `batch.logit_positions`. Arguments as those of `row_losses`."""
    attachment.cu_seqlens = batch.cu_seqlens
    tokens = {"input_ids": batch.input_ids}
    if prompt is not None:
        embedded = model.get_input_embeddings()(batch.input_ids)
        tokens = {"inputs_embeds": batch.with_prompt(embedded, prompt.to(embedded.dtype))}
    return model(
        **tokens,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        logits_to_keep=batch.logit_positions,
        use_cache=False,
    ).logits


def set_mode(model: nn.Module, recompute: bool = True) -> None:
    """Put a frozen model into eval mode, so that no dropout is active.

    Modules that need training mode for their derivative (`differentiable_mode`) stay in it. With `recompute`, so do
    modules with gradient checkpointing, since transformers checkpoints only in that mode.
    """
    for module in model.modules():
        checkpoints = recompute and bool(getattr(module, "gradient_checkpointing", False))
        module.training = checkpoints or differentiable_mode(module)


@contextlib.contextmanager
def frozen(model: PreTrainedModel, but: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Within the block only the weights in `but` require a gradient, and no dropout is active. Then all is restored."""
    reshard(model)
    needs_grad = [(p, p.requires_grad) for p in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    try:
        set_mode(model.requires_grad_(False))
        for parameter in but:
            parameter.requires_grad_(True)
        yield
    finally:
        reshard(model)
        for parameter, flag in needs_grad:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag
