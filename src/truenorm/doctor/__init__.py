"""What is wrong with a model's normalization: facts, checks, diagnosis, and a ledger of writes."""
