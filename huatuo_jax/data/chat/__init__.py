"""Chat templates: render dialogues as tokens, with the mask of trained ones."""
