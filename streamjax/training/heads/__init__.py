"""Finding the heads that look far back: optimised gates and scores."""
