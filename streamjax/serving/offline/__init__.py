"""Files of requests that nobody waits for: their order, and answers in the form of OpenAI's batches."""
