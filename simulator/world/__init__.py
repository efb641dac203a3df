"""The whole system in one interpreter: unchanged daemons as processes of an in-memory kernel, and a strategy
that says which of them takes the next step (docs/decisions/0024).
"""
