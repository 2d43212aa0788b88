"""Row formats of data files: dialogues, instructions, exams, comparisons."""
