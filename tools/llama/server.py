"""A llama-server of xllamacpp, in its own environment: prints its address, and ends with its standard input."""

import argparse
import sys

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--slots", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--keys", required=True)
    parser.add_argument("--values", required=True)
    parser.add_argument("--flash", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    options = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.slot_save_path = options.gguf, options.slots
    params.port, params.n_ctx, params.n_parallel = options.port, options.context, 1
    params.endpoint_slots, params.warmup = True, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    types, flash = xllamacpp.ggml_type, xllamacpp.llama_flash_attn_type
    params.cache_type_k = getattr(types, f"GGML_TYPE_{options.keys.upper()}")
    params.cache_type_v = getattr(types, f"GGML_TYPE_{options.values.upper()}")
    params.flash_attn_type = getattr(flash, f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if options.flash else 'DISABLED'}")
    server = xllamacpp.Server(params)
    print(f"address {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
