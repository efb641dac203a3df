"""The whole system in one process, under one seed."""
