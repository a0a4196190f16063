"""Feedback losses: heads on frozen features, and the aggregation of several feedbacks."""
