"""What makes evidence and shows it: text, evaluation, timing, records, figures, the scorecard."""
