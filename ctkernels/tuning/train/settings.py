"""Settings of a tuning run, all methods together; each method reads some of them (`Method.options`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ctkernels.tuning.data.batches import Layout

MAX_SEED = 2**31 - 1  # the seed and the epoch share the 64-bit seed of token dropout

Hide = Literal["none", "self", "suffix", "power"]
Start = Literal["context", "separate", "permuted", "pooled", "labels", "vocabulary", "first-ids", "normal", "uniform"]
Trained = Literal["both", "keys", "values"]
Demonstrate = Literal["similar", "fixed"]
Answers = Literal["all", "last"]


@dataclass(frozen=True)
class TrainSettings:
    """What a run does. A method's own defaults come from `methods.METHODS[name].settings()`.

    Args:
        epochs: passes over all rows.
        lr: peak learning rate of AdamW (betas 0.9/0.999, no weight decay); it falls to 0 along a cosine.
        batch_rows: rows of one optimiser step, drawn anew each epoch; None takes one step per epoch on all rows. The
            LoRA stage of ttt+ct-kv takes 4, whatever is set here.
        clip_norm: largest gradient norm; None does not clip.
        seed: of everything that is drawn, 0 to 2^31 - 1; the same seed gives the same bits.
        learn_stop: also train the delimiter after the answer, so that generation learns where to stop.
        layout: "packed" runs rows back to back without padding, "padded" as a right-padded batch; same gradients.
        max_tokens: most tokens of one micro-batch; gradients of all of them are accumulated before the step.
        backend: of the attention op; None takes the best available one.
        drop_p: token dropout: probability in [0, 1) that a row does not see a context token in an epoch.
        drop_from: context tokens before this position are never dropped (an attention sink, an instruction).
        leave_one_out: what a row does not see of the demonstrations: "none" hides nothing, "self" its own, "suffix" its
            own and all after it, "power" its own and a random half of the others, drawn anew each epoch.
        leave_one_out_from: hide demonstrations only if there are at least so many of them.
        start: what training starts from. ct-kv: "context" (one pass over the demonstrations), "separate" (each
            demonstration encoded on its own), "permuted" (averaged over orders), "pooled" or "labels" (compressed).
            Prefixes and prompts without demonstrations: "vocabulary" (random tokens), "first-ids" (token ids
            0, 1, 2, ...), "normal" or "uniform" (random numbers of the model's own scale).
        permutations: orders that a "permuted" start averages over.
        pool: neighbouring tokens of a demonstration that a "pooled" start merges into one.
        trained: what of the prefix is trained: "both", "keys" or "values".
        top_layers: train the prefix of the last so many layers alone; None trains all.
        front_tokens: learned tokens in front of the demonstrations, visible to every row.
        frozen_tokens: the first so many prefix tokens stay as they were (an attention sink).
        pull: weight of the L2 pull towards the start: pull / 2 * sum of (weight * squared distance).
        fisher: weigh the pull by the diagonal of the Fisher information at the start, scaled to mean 1; without `rank`
            and `hidden`.
        rank: train an update of the prefix of this rank in every layer instead of the prefix itself; None is full rank.
        prompt_tokens: length of a prefix or soft prompt that does not start from demonstrations.
        hidden: width of a two-layer network that writes the prefix or prompt while training; None trains it directly.
        demonstrate: which demonstrations ipt puts in words before an input: the most "similar" ones, or "fixed" ones.
        ipt_shots: how many of them.
        lora_rank: rank of the LoRA update of the weights.
        lora_alpha: its scale is lora_alpha / lora_rank.
        lora_targets: names of the modules it updates; none takes those of the model's family.
        answers: which answers of an in-context sequence ttt trains: "all" or the "last".
        ttt_epochs: epochs of the LoRA stage of ttt+ct-kv.
        ttt_lr: its learning rate.
        rounds: passes over the demonstrations that deep-thinking takes.
        eta: share of the new keys and values in each of them, in (0, 1].
        radius: largest L2 distance of a token's embedding from its start in cpt, for a width of 2048; it grows with the
            square root of the width.
        format_radius: the same for delimiters.

    Raises:
        ValueError: a value out of its range.
    """

    epochs: int = 25
    lr: float = 3e-3
    batch_rows: int | None = None
    clip_norm: float | None = 1.0
    seed: int = 0
    learn_stop: bool = False
    layout: Layout = "packed"
    max_tokens: int = 4096
    backend: str | None = None
    drop_p: float = 0.0
    drop_from: int = 0
    leave_one_out: Hide = "none"
    leave_one_out_from: int = 0
    start: Start = "context"
    permutations: int = 8
    pool: int = 4
    trained: Trained = "both"
    top_layers: int | None = None
    front_tokens: int = 0
    frozen_tokens: int = 0
    pull: float = 0.0
    fisher: bool = False
    rank: int | None = None
    prompt_tokens: int = 32
    hidden: int | None = None
    demonstrate: Demonstrate = "similar"
    ipt_shots: int = 4
    lora_rank: int = 64
    lora_alpha: float = 64.0
    lora_targets: tuple[str, ...] = ()
    answers: Answers = "all"
    ttt_epochs: int = 8
    ttt_lr: float = 1e-4
    rounds: int = 5
    eta: float = 0.1
    radius: float = 0.1
    format_radius: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))

        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        for name in ("epochs", "max_tokens", "permutations", "pool", "prompt_tokens", "ipt_shots", "lora_rank"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("ttt_epochs", "rounds"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("batch_rows", "top_layers", "rank", "hidden"):
            require(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1, or None")
        for name in ("drop_from", "leave_one_out_from", "front_tokens", "frozen_tokens"):
            require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("lr", "ttt_lr", "lora_alpha", "radius", "format_radius"):
            require(0 < getattr(self, name) < float("inf"), name, "positive")
        require(0 <= self.drop_p < 1, "drop_p", "in [0, 1)")
        require(0 <= self.pull < float("inf"), "pull", "at least 0")
        require(0 < self.eta <= 1, "eta", "in (0, 1]")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive, or None")
        require(0 <= self.seed <= MAX_SEED, "seed", f"in [0, {MAX_SEED}]")
        if self.rank is not None and self.hidden is not None:
            raise ValueError("rank and hidden exclude each other: both write the prefix; set one of them to None")
        if self.fisher and not self.pull:
            raise ValueError("fisher weighs the pull towards the start, which is 0; set pull, too")
        if self.fisher and (self.rank is not None or self.hidden is not None):
            raise ValueError("fisher needs the prefix itself to be trained; set rank and hidden to None")
        choices = {"layout": Layout, "leave_one_out": Hide, "start": Start, "trained": Trained}
        for name, kind in (choices | {"demonstrate": Demonstrate, "answers": Answers}).items():
            *others, last = get_args(kind)
            require(getattr(self, name) in get_args(kind), name, f"{', '.join(others)} or {last}")

    def dropout_seed(self, epoch: int) -> int:
        """64-bit seed of what is drawn in an epoch: the run's seed above, the epoch below."""
        return (self.seed << 32) | epoch
