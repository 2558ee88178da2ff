"""The adapter file: read, checked, written, described."""
