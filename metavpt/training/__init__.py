"""The training loop and what it needs: engine, streams, budget, schedule, checkpoints, health, logs."""
