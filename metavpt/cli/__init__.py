"""What the commands share: one-line errors and the targets that a configuration may name."""
