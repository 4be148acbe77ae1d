"""Contrastive training of an image tower with a text tower."""
