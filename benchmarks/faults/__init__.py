"""Whether diff finds injected faults."""
