"""experiment -> steps -> recording."""
