"""The backends of the op, side by side. None of them imports another; `dispatch.py` has the table."""
