"""`largebatch bench gauss_newton`: steps where each layer's Gauss-Newton block is solved."""
