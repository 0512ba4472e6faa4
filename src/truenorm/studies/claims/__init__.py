"""The claims made for batch norm, each a small paired study with a verdict."""
