"""What backprop keeps between its two directions: layers' inputs, keys and values, their gradients."""
