"""Storage: the only code that reads and writes a run's SQLite and safetensors files."""
