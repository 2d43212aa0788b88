"""Row formats: dialogues, prompts, preference pairs, cases and exam questions out of data files."""
