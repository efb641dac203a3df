"""Our side of the figures, as programs that report like the rivals do."""
