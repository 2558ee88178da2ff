"""A tiny world of toys: individuals, settings, styles, captions and the pictures that belong to them."""
