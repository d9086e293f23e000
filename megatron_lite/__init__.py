"""Pretraining of language models on any data x tensor x pipeline layout."""

__version__ = "0.1.0"
