"""What follows a layer's token mixer: one file a kind of MLP."""
