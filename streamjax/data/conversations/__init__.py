"""Records to learn from: conversations, preferences and prompts, with the tokens that a model is to learn"""
