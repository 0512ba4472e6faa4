"""Studies: many runs, paired by seed, and what follows from them with what certainty."""
