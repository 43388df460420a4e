"""Everything that there is to know about the op on a GPU: is it right, and how fast is it. See `__main__.py`."""
