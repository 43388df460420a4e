"""The model alone: no demonstrations, no training."""

from ctkernels.tuning.methods.base import Method

ZERO_SHOT = Method(
    name="zero-shot", summary="the model alone, without demonstrations", trains="nothing", starts_from="nothing"
)
