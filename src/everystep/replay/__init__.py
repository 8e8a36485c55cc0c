"""Going back: replay any step of a run, bit for bit."""
