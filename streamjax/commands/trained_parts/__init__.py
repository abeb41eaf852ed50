"""Commands that train what stands beside a frozen model: draft heads, and a network that recalls old tokens."""
