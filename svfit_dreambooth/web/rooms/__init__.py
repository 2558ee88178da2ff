"""What the page knows: workspace, runs, library, painting."""
