"""Chat templates: dialogues as tokens, with the ones that are trained on."""
