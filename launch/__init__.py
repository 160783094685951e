"""Aurora and other clusters: jobs, environment, preflight, sweeps over an allocation, watching."""
