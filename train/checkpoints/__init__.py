"""Save a run, describe, verify and export what is saved, and resume from it."""
