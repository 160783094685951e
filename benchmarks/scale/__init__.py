"""`largebatch bench scale`: messages, bytes and memory at 38,400 ranks, over fake groups."""
