"""Between a command and its terminal: input, output, errors of one line."""
