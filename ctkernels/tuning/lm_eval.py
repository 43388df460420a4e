"""`evaluation/lm_eval.py` under its public name, also for `python -m ctkernels.tuning.lm_eval`."""

from ctkernels.tuning.evaluation.lm_eval import PrefixLM

__all__ = ["PrefixLM"]

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
