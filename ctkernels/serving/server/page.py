"""The page at `/`, rendered here; it loads nothing from anywhere else."""

from __future__ import annotations

import secrets
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi.responses import HTMLResponse
from jinja2 import Environment, StrictUndefined, Template

if TYPE_CHECKING:
    from ctkernels.serving.server.service import Service

EXAMPLE = """{"input": "My parcel is late.", "output": "delivery"}
{"input": "The app forgets my password.", "output": "account"}
{"input": "I was charged twice.", "output": "payment"}
{"input": "Where is my order?", "output": "delivery"}"""
SHOWN = 500  # prefixes in the list; all of them can be used by name


def render(service: Service) -> HTMLResponse:
    """The page as it is now. What it may load and run is said in its policy."""
    nonce, names = secrets.token_urlsafe(16), list(service.store)
    text = _template().render(
        model=service.name,
        names=names[:SHOWN],
        count=len(names),
        limits=service.limits,
        example=EXAMPLE,
        nonce=nonce,
    )
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
    )
    headers = {
        "content-security-policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
    }
    return HTMLResponse(text, headers=headers)


@cache
def _template() -> Template:
    source = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
