"""What a run says of itself: display, loggers, readings, throughput, provenance."""
