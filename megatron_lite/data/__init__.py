"""From a corpus to the samples of a step."""

FOLDER_VARIABLE = "MEGATRON_LITE_DATA_FOLDER"
"""Where whoever prepared the data tells the ranks its folder. Its name is a hash over the sources, which all ranks
would otherwise read again, each for itself."""
