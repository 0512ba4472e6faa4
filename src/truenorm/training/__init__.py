"""Training one classifier: the loop, its run folder, and what is done with its model."""
