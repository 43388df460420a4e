"""The op's definition once more, written down densely and on its own.

Everything here follows the formulas of the documentation and shares no code with the package: visibility and logits
are materialised as [B, H, S, P + T], gradients come from autograd, the random stream is Philox in plain integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al. (SC'11): ten rounds of two 64-bit products, the key bumped between rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a = 0xD2511F53 * c0
        b = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def kept_tokens(seed: int, row_ids: list[int], length: int, drop_p: float) -> Tensor:
    """bool [B, C]: what token dropout leaves visible."""
    kept = torch.ones(len(row_ids), length, dtype=torch.bool)
    if drop_p == 0:
        return kept
    key = (seed & WORD, (seed >> 32) & WORD)
    limit = int(drop_p * 2**32)
    for b, row_id in enumerate(row_ids):
        for block in range((length + 3) // 4):
            words = philox((block, row_id, 0, 0), key)
            for c in range(4 * block, min(4 * block + 4, length)):
                kept[b, c] = words[c & 3] >= limit
    return kept


def context_visible(
    batch: int,
    length: int,
    hidden: Tensor | None = None,
    drop_p: float = 0.0,
    seed: int = 0,
    row_ids: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """bool [B, C]: the context rule, i.e. not in the hidden span, kept, and not dropped."""
    ids = list(range(batch)) if row_ids is None else row_ids.tolist()
    visible = kept_tokens(seed, ids, length, drop_p)
    if hidden is not None:
        for b, (start, end) in enumerate(hidden.tolist()):
            visible[b, start:end] = False
    if keep is not None:
        visible &= keep.cpu()
    return visible


def visible_keys(
    batch: int,
    S: int,
    T: int,
    P: int,
    mask: dict | None,
    prefix_index: Tensor | None,
    prefix_lens: Tensor | None,
    seq_lens: Tensor | None,
    causal: bool,
    window: int | None,
    window_prefix: bool,
) -> tuple[Tensor, Tensor]:
    """bool [B, S, P + T] and, of the same shape, how many positions each key lies behind each query."""
    visible = torch.zeros(batch, S, P + T, dtype=torch.bool)
    distance = torch.zeros(batch, S, P + T, dtype=torch.int64)
    mask = dict(mask or {})
    keep = mask.get("keep")
    length = mask.pop("length", None)
    if length is None:
        length = P if keep is None else keep.shape[1]
    in_context = torch.ones(batch, P + T, dtype=torch.bool)
    in_context[:, :length] = context_visible(batch, length, **mask)[:, : P + T]

    own = torch.arange(P + T) - P  # own index t; negative for the prefix
    for b in range(batch):
        g = 0 if prefix_index is None else int(prefix_index[b])
        prefix_len = P if prefix_lens is None else int(prefix_lens[g])
        row_len = T if seq_lens is None else int(seq_lens[b])
        offset = 0 if T == S else row_len - S
        # Own keys follow the valid part of the prefix directly: that is where the model would see them.
        position = torch.cat([torch.arange(P), prefix_len + torch.arange(T)])  # [P + T]
        valid = torch.cat([torch.arange(P) < prefix_len, torch.arange(T) < row_len])  # [P + T]
        i = torch.arange(S)[:, None] + offset  # own positions of the queries, [S, 1]
        behind = prefix_len + i - position
        sees = valid & in_context[b] & (i < row_len)  # no key, for a padding query
        if causal:
            sees = sees & ((own < 0) | (own <= i))
        if window is not None:
            near = behind < window
            if not window_prefix:
                near = near | (own < 0)
            sees = sees & near
        visible[b] = sees
        distance[b] = behind
    return visible, distance


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    mask: dict | None = None,
    prefix_index: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    seq_lens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    window_prefix: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    seen: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, S, Dv], lse [B, H, S], probabilities [B, H, S, P + T]; every step in q's type, for autograd.

    seen: what `visible_keys` gives for these arguments, if it is known already.
    """
    B, H, S, D = q.shape
    Hk, T = k.shape[1:3]
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    P = prefix_k.shape[2]
    index = torch.zeros(B, dtype=torch.long) if prefix_index is None else prefix_index.long()
    keys = torch.cat([prefix_k.to(q.dtype)[index], k], 2).repeat_interleave(H // Hk, 1)  # [B, H, P + T, D]
    values = torch.cat([prefix_v.to(q.dtype)[index], v], 2).repeat_interleave(H // Hk, 1)  # [B, H, P + T, Dv]

    visible, distance = seen or visible_keys(
        B, S, T, P, mask, prefix_index, prefix_lens, seq_lens, causal, window, window_prefix
    )
    logits = (q @ keys.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if prefix_bias is not None:
        bias = prefix_bias.to(q.dtype)
        bias = bias[index] if bias.dim() == 3 else bias.expand(H, P).expand(B, H, P)  # [B, H, P]
        logits = logits + torch.cat([bias, bias.new_zeros(B, H, T)], 2)[:, :, None]
    if alibi_slopes is not None:
        logits = logits - (alibi_slopes.double()[:, None, None] * distance[:, None]).to(q.dtype)

    # A query without a visible key is given harmless logits, so that autograd stays finite, and is then cut out.
    sees_any = visible.any(-1)[:, None]  # [B, 1, S]
    logits = logits.masked_fill(~visible[:, None], float("-inf")).masked_fill(~sees_any[..., None], 0.0)
    lse = torch.logsumexp(logits.to(torch.promote_types(q.dtype, torch.float32)), -1)
    lse = lse.masked_fill(~sees_any, float("-inf"))
    if sinks is not None:  # one more logit, whose probability is thrown away, as models with sinks write it
        sink = sinks.to(q.dtype)[:, None, None].expand(B, H, S, 1)
        logits = torch.cat([logits, sink.masked_fill(~sees_any[..., None], 0.0)], -1)
    p = torch.softmax(logits, -1)[..., : P + T].masked_fill(~visible[:, None], 0.0)
    return p @ values, lse, p
