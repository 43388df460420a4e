"""vLLM's own OpenAI server, with the prefixes of a store beside its base model."""

from __future__ import annotations

import asyncio
import gc
import json
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.exceptions import GenerationError, VLLMNotFoundError, VLLMValidationError
from vllm.logger import configure_logging_from_args, init_logger
from vllm.outputs import RequestOutput
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from ctkernels.serving.vllm.connector import MEMORY_BYTES, text_config
from ctkernels.serving.vllm.files import PrefixFiles, folder_of_store
from ctkernels.serving.vllm.requests import Prefixes, PrefixMiddleware, RequestError
from ctkernels.tuning.hf.fingerprint import Weights, base_weights

logger = init_logger(f"vllm.{__name__}")
PROVED = ("llama", "qwen2", "gemma3_text")  # classes whose tokens `make serve-check` compares
OURS = ("kv-transfer-config", "headless", "api-server-count", "grpc", "middleware")  # options that are set here


@dataclass(frozen=True)
class ServeSettings:
    """What is served, and where.

    model: directory or hub id.  store: folder of a PrefixStore.  memory_bytes: of prefixes in each worker.
    allow_other_weights: do not compare the weights of the model with those that prefixes were made for.
    rest: options of `vllm serve`.
    """

    model: str
    store: Path
    host: str = "127.0.0.1"
    port: int = 8000
    memory_bytes: int = MEMORY_BYTES
    allow_other_weights: bool = False
    rest: Sequence[str] = ()


class PrefixedLLM(AsyncLLM):
    """vLLM's engine; requests that hold a ticket read their prefix."""

    prefixes: Prefixes

    async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any) -> Any:
        """As of vLLM.

        Raises:
            VLLMNotFoundError, VLLMValidationError: a prefix that is gone, or a request that cannot read one.
        """
        try:
            prompt = await asyncio.to_thread(self.prefixes.placed, prompt, params)
        except RequestError as error:
            raise (VLLMNotFoundError if error.status == 404 else VLLMValidationError)(str(error)) from None
        return await super().add_request(request_id, prompt, params, *args, **options)

    async def generate(self, *args: Any, **options: Any) -> AsyncGenerator[RequestOutput, None]:
        """As of vLLM; a request that ended because its prefix could not be loaded says so.

        Raises:
            GenerationError: such a request.
        """
        inner = super().generate(*args, **options)
        try:
            async for output in inner:
                if any(part.finish_reason == "error" for part in output.outputs):
                    raise GenerationError(
                        "the prefix of this request could not be loaded (removed, replaced or damaged since it was "
                        "chosen); the server's log has the reason"
                    )
                yield output
        finally:
            await inner.aclose()  # now, so that the request of a client that left is aborted


def weights_of(args: Namespace) -> Weights | None:
    """The fingerprint of the checkpoint that vLLM's arguments name; reads all of it, on the CPU, in its own type.

    Raises:
        ValueError: transformers cannot load it here.
    """
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", **options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"the weights of {args.model!r} cannot be compared with those that the prefixes were made for: {error}; "
            "--allow-other-weights does not compare them"
        ) from error
    found = base_weights(loaded, alone=True)
    del loaded
    gc.collect()
    return found


def arguments(settings: ServeSettings, weights: Weights | None) -> Namespace:
    """The arguments of vLLM's server.

    Raises:
        ValueError: an option of vLLM that is set here.
    """
    given = {word.partition("=")[0].lstrip("-").replace("_", "-") for word in settings.rest if word.startswith("--")}
    taken = sorted(given.intersection(OURS))
    if taken:
        raise ValueError(f"--{taken[0]} is set by ctkernels serve and cannot be given to vLLM")
    extra: dict[str, Any] = {"store": str(settings.store.resolve()), "memory_bytes": settings.memory_bytes}
    if weights is not None:
        extra["weights"] = list(weights)
    transfer = {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "ctkernels.serving.vllm.connector",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": extra,
        "kv_load_failure_policy": "fail",
    }
    words = ["--model", settings.model, "--host", settings.host, "--port", str(settings.port)]
    words += ["--kv-transfer-config", json.dumps(transfer), "--disable-hybrid-kv-cache-manager"]
    args = make_arg_parser(FlexibleArgumentParser(prog="ctkernels serve")).parse_args([*words, *settings.rest])
    validate_parsed_serve_args(args)
    return args


async def _serve(args: Namespace, settings: ServeSettings, weights: Weights | None) -> None:
    address, sock = setup_server(args, reuse_port=False)
    options = AsyncEngineArgs.from_cli_args(args)
    config = options.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    model = text_config(config.model_config)
    if model.model_type not in PROVED:
        logger.warning("prefixes of %s models have not been tested in vLLM; compare some answers", model.model_type)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    files = PrefixFiles(settings.store, model, weights, tokenizer.bos_token_id or 0)
    engine = PrefixedLLM.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=options.enable_log_requests,
        aggregate_engine_logging=options.aggregate_engine_logging,
        disable_log_stats=options.disable_log_stats,
    )
    try:
        engine.prefixes = Prefixes(files, args.served_model_name or [args.model], tokenizer)
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        # around the routes alone: behind vLLM's own middleware, which checks the API key and is in place by now
        app.router.middleware_stack = PrefixMiddleware(app.router.middleware_stack, engine.prefixes)
        await init_app_state(engine, app.state, args, tasks)
        logger.info("serving the prefixes of %s on %s", settings.store, address)
        logs = get_uvicorn_log_config(args)
        ended = await serve_http(
            app,
            sock=sock,
            enable_ssl_refresh=args.enable_ssl_refresh,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
            h11_max_header_count=args.h11_max_header_count,
            **({} if logs is None else {"log_config": logs}),
        )
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
    try:
        await ended
    finally:
        sock.close()


def serve(settings: ServeSettings) -> None:
    """Start the server; returns when it is stopped.

    Raises:
        ValueError: no such store, an option of vLLM that is set here.
    """
    folder_of_store(settings.store)
    cli_env_setup()
    args, weights = arguments(settings, None), None
    if not settings.allow_other_weights:
        weights = weights_of(args)
        args = arguments(settings, weights)
    configure_logging_from_args(args)
    uvloop.run(_serve(args, settings, weights))
