"""Figures, generated pages, the scorecard and notebook runs."""
