"""Tests may import everything; nothing imports tests."""
