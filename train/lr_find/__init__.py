"""`largebatch train mode=lr_find`: a sweep of learning rates in one run."""
