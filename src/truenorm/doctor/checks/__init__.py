"""The checks: a stable code, a look at a model's facts, and one at the book of a ledger.

Every check stands under its functions, and every threshold beside the reason for its number.
"""
