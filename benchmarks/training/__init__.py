"""Training's figures: post-training of a pretrained model, on data that is made here."""
