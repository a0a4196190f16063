"""Task designers: learned masks, crops, views, weights and targets."""
