"""In-context learning: the demonstrations' KV cache as it is."""

from ctkernels.tuning.methods.base import Method

ICL = Method(name="icl", summary="the demonstrations in context, untrained", trains="nothing", starts_from="context")
