"""Image and text encoders: what turns pixels or token ids into vectors."""
