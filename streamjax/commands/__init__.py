"""The command lines: flags, wiring and printing. Nothing imports from here."""
