"""ctkernels: attention over one shared, trainable KV prefix, and Context Tuning built on it."""

from ctkernels.attention import prefix_attention, prefix_attention_varlen
from ctkernels.mask import ContextMask
from ctkernels.prepare import prepare

__version__ = "0.1.0"
__all__ = ["ContextMask", "__version__", "prefix_attention", "prefix_attention_varlen", "prepare"]
