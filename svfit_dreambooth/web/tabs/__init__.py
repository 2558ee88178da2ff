"""The page's tabs: what is seen, and what its buttons do."""
