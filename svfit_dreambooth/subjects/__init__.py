"""Several subjects in one run: above training, which knows one."""
