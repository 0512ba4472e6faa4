"""A run as a person sees it: the terminal, JSON, and one self-contained page. Computes nothing."""
