"""A study's second question: the final loss at a budget of samples, for people and programs."""
