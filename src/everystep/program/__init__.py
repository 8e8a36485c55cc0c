"""The step as data: the program, how to read it, bind it to memory and run it."""
