"""Reaching Hugging Face's hub, whose clients talk a lot when they cannot."""

from __future__ import annotations

import logging


def quiet_hub() -> None:
    """Keep the client's log of retries from burying our one error."""
    for name in ("huggingface_hub", "httpx", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
