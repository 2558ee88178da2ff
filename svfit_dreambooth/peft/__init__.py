"""SVFit as one of PEFT's methods."""
