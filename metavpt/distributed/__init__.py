"""Several processes: differentiable collectives, and FSDP."""
