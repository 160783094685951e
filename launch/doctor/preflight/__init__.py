"""The checks that a job's ranks make together before it trains."""
