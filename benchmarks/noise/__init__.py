"""`largebatch bench noise`: what measuring the gradient noise costs a step."""
