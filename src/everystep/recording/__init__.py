"""What is kept: the only code that knows a run's SQLite and safetensors."""
