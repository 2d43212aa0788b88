"""The whole recipe: from dialogues to an aligned, exported model and a report."""
