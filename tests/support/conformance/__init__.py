"""Other people's test suites, with TrueNorm's layers in the place of theirs.

A suite is a module with a function ``cases()``. Torch's databases are those installed with it; what
other libraries test is told again in words of our own, with the file that it is from. Nothing of
theirs is copied. ``bench/conformance.py`` runs all of it and writes docs/conformance.md.
"""
