"""What differs from base model to base model, and opening one."""
