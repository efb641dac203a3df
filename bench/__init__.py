"""Each figure with its limit and its rivals, measured in the same run: `python -m bench`."""
