"""Pictures on disk: found, read, cropped."""
