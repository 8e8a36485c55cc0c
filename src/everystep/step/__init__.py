"""How one step runs: torch only, knows neither experiments nor disks."""
