"""Studies that produce the figures and records."""
