"""`largebatch submit`: a job's script for a cluster, its binding, its submission."""
