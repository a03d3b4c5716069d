"""Training: set-up in a numbered order, one step, loss, optimiser, schedule, run state, monitor."""
