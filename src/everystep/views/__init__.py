"""A run as what a person looks at. Computes nothing about training."""
