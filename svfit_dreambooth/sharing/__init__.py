"""Adapters on their way to other people and programs."""
