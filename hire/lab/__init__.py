"""Tools of the reproduction: text, evaluation, timing, records, figures and the scorecard."""
