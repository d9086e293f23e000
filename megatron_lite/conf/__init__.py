"""Presets: YAML values only, one folder per group. A package, so that they are installed with the code."""
