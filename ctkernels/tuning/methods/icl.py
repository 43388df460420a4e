"""In-context learning: the demonstrations' KV cache as it is."""

from ctkernels.tuning.adapters.adapter import Adapter
from ctkernels.tuning.adapters.prefix import KVPrefix
from ctkernels.tuning.methods.base import Method, Run
from ctkernels.tuning.train.options import Options


def context_prefix(run: Run[Options]) -> KVPrefix:
    """The keys and values of the demonstrations under the model's weights as they are now."""
    context = run.context
    return KVPrefix.from_tokens(run.model, context.input_ids, context.segments, run.tokenizer, run.method, run.recorded)


def fit(run: Run[Options]) -> Adapter:
    return Adapter(context_prefix(run))


ICL = Method(name="icl", summary="the demonstrations in context, untrained", options=Options, fit=fit)
