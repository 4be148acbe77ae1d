"""Image and text encoders: what turns pixels or token ids into vectors.

Importing the package, or any part of it, registers the image towers with timm.
"""

from encoders.variants import VARIANTS

__all__ = ["VARIANTS"]
