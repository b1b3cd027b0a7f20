"""Looking back at runs: the list of all, and two side by side. Knows no torch."""
