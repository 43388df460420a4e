"""Our own server, for laptops and tests: OpenAI's API for a model and its stored prefixes.

run.py         a socket, signals                     page.html    what a browser gets
guard.py       token, origin, size of a request
app.py         routes                                protocol.py  the JSON of requests
service.py     names, prompts, limits                tuner.py     tuning in the background
engine.py      the thread that owns the model        metrics.py   what it counts
batch.py       rows of different prefixes            slots.py     their cache
text.py        tokens -> text, stop strings          sampling.py  logits -> token
servable.py    the proof that a model class can be served like this
"""

from ctkernels.serving.server.protocol import Limits
from ctkernels.serving.server.run import ServerOptions, serve

__all__ = ["Limits", "ServerOptions", "serve"]
