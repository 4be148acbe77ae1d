"""Image classification: the pretraining task of the image encoder."""
