"""Photos to adapter."""
