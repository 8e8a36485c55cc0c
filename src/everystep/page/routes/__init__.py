"""The addresses of the server, and their answers."""
