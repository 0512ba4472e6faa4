"""The checks: a stable code, a question to the facts, and an answer with evidence or none.

Every threshold stands in its check's module, beside the reason for its number.
"""
