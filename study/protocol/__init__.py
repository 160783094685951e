"""How a study asks: the search at one batch size, the order of searches, and their runs."""
