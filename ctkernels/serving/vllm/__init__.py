"""Stored prefixes in vLLM: its own OpenAI server, with a connector that puts keys and values where a prompt begins.

    salts.py       which prefix a request reads, in its `cache_salt`
    files.py       the prefixes of a folder, checked against the engine's model; `moving.py` moves their keys
    requests.py    HTTP requests: `model="base:prefix"` becomes placeholder tokens and a salt
    loads.py       scheduler: which part of a prefix goes into which blocks
    memory.py      worker: a rank's share of the heads, in the cache's type, the least recently used leaving first
    connector.py   the two halves of the connector, vLLM's `KVConnectorBase_V1`
    launch.py      vLLM's server with all of this

Only `connector.py` and `launch.py` need vLLM.
"""
