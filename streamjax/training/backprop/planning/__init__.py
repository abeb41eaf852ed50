"""How much memory an order of backprop needs, and which one to take."""
