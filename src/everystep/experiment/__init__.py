"""The experiment: everything that determines a run, in the chapter's order."""
