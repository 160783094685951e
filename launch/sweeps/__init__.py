"""A sweep's trials on the nodes of a cluster: Parsl, slices of nodes, records."""
