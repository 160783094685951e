"""The loop and what it stands on: engines, ranks and devices, data, models, tasks, run records."""
