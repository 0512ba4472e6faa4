"""What a person sees: terminal, JSON and self-contained pages. Computes nothing."""
