"""Which step comes next: strategies over an abstract schedule, and what they find as a story to read."""
