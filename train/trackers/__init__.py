"""Where else a run's lines go, beside its own metrics.jsonl: trackers, by their own libraries."""
