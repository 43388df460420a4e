"""What the loop can train: a KV prefix, a soft prompt, or a LoRA update of the weights."""

from ctkernels.tuning.learners.base import Learner
from ctkernels.tuning.learners.lora import LoraLearner
from ctkernels.tuning.learners.prefix import PrefixLearner
from ctkernels.tuning.learners.prompt import PromptLearner

__all__ = ["Learner", "LoraLearner", "PrefixLearner", "PromptLearner"]
