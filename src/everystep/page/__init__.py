"""The local web page: watch a run, then walk through it. The server imports no torch."""
