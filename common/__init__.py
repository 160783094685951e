"""Small things that every folder may use: errors, numbers, text, files, robust statistics."""
