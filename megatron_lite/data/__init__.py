"""Data preparation and loading: from a corpus to the samples of a training step."""

FOLDER_VARIABLE = "MEGATRON_LITE_DATA_FOLDER"
"""Environment variable with the folder of the prepared data, set by the process that prepared it. Without it, every
rank would read all sources again to compute the hash in the folder's name."""
