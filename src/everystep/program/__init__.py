"""The step as data: what a program is, how it is read, bound to memory and run."""
