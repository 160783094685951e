"""`largebatch nic`: network counters of the nodes, recorded, surveyed and drawn."""
