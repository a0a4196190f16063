"""Several processes: collectives that autograd differentiates, and FSDP."""
