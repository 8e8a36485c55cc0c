"""Steps of a loop that are recognised by their calls of torch's functions."""
