"""How well an adapter learnt its subject, and what it changed besides."""
