"""What the loop can train: a KV prefix (or several side by side), a soft prompt, or a LoRA update of the weights."""

from ctkernels.tuning.train.learners.base import Learner
from ctkernels.tuning.train.learners.lora import LoraLearner, LoraOptions
from ctkernels.tuning.train.learners.prefix import PrefixLearner, PrefixOptions
from ctkernels.tuning.train.learners.prefixes import PrefixLearners
from ctkernels.tuning.train.learners.prompt import PromptLearner

__all__ = ["Learner", "LoraLearner", "LoraOptions", "PrefixLearner", "PrefixLearners", "PrefixOptions", "PromptLearner"]
