"""Evaluation protocols: what a model scores, by one written definition per metric."""
