"""`largebatch plan`: a run's schedule, printed and drawn before it is paid for."""
