"""Settings of a tuning run, with the defaults of the ct-kv loop visible in one place."""

from __future__ import annotations

from dataclasses import dataclass

from ctkernels.tuning.batches import Layout

MAX_SEED = 2**31 - 1  # the seed and the epoch share the 64-bit seed of token dropout


@dataclass(frozen=True)
class TrainSettings:
    """What the loop does. The method's own defaults come from `methods.METHODS[name].settings()`.

    Args:
        epochs: passes over all rows; one optimiser step each.
        lr: peak learning rate of AdamW (betas 0.9/0.999, no weight decay); it falls to 0 along a cosine.
        drop_p: probability in [0, 1) that a row does not see a context token in an epoch.
        leave_one_out: hide each row's own demonstration from it.
        learn_stop: also train the delimiter after the answer, so that generation learns where to stop.
        clip_norm: largest gradient norm; None does not clip.
        seed: of token dropout, 0 to 2^31 - 1; the same seed gives the same bits.
        layout: "packed" runs rows back to back without padding, "padded" as a right-padded batch; same gradients.
        max_tokens: most tokens of one micro-batch; gradients of all of them are accumulated before the step.
        backend: of the attention op; None takes the best available one.

    Raises:
        ValueError: a value out of its range.
    """

    epochs: int = 25
    lr: float = 3e-3
    drop_p: float = 0.05
    leave_one_out: bool = True
    learn_stop: bool = False
    clip_norm: float | None = 1.0
    seed: int = 0
    layout: Layout = "packed"
    max_tokens: int = 4096
    backend: str | None = None

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        require(self.epochs >= 1, "epochs", "at least 1")
        require(0 < self.lr < float("inf"), "lr", "positive")
        require(0 <= self.drop_p < 1, "drop_p", "in [0, 1)")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive, or None")
        require(0 <= self.seed <= MAX_SEED, "seed", f"in [0, {MAX_SEED}]")
        require(self.layout in ("packed", "padded"), "layout", "packed or padded")
        require(self.max_tokens >= 1, "max_tokens", "at least 1")

    def dropout_seed(self, epoch: int) -> int:
        """64-bit seed of the token dropout of an epoch: the run's seed above, the epoch below."""
        return (self.seed << 32) | epoch
