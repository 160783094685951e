"""Files of tokens: reading them through a memory map, their order, and making them from text."""
