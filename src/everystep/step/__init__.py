"""How one step runs: uses only torch, knows neither experiments nor disks."""
