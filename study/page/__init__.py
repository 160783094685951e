"""A study for people: sentences, tables, pictures, the page that holds them, and CSV files."""
