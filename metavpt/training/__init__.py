"""The training loop with its engine, streams, budget, schedule, checkpoints, health and logs."""
