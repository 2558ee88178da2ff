"""The page: train, generate and share in a browser."""
