"""Adapters on a pipeline, and the pictures that it paints."""
