"""A pool of pages that all streams of an engine share: who has which page, and the batch that lives on them."""
