"""Going back: any step of a run again, bit for bit."""
