"""Single runs: what each recorded, step by step, as pictures and a page."""
