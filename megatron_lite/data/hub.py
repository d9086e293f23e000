"""Access to the Hugging Face Hub."""

from __future__ import annotations

import logging


def quiet_hub() -> None:
    """Silence the hub clients' log of retries, which would bury our error message."""
    for name in ("huggingface_hub", "httpx", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
