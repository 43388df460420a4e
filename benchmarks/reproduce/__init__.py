"""The reproduction of the papers' table. Begin with `plan.py`; `__main__.py` has the command line and the stages."""
